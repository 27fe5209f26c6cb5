"""Stage 1, pretraining: a Transformer learns to predict the next token of plain text.

    loss = -1/N · Σ log p(token t+1 | tokens ≤ t)      over all N tokens of the batch

    python pretrain.py                                      one process: a laptop's CPU, or one GPU
    torchrun --nproc_per_node=8 pretrain.py --config=…      eight GPUs, each batch shared out

It reads train.bin and val.bin of the run folder and writes pretrain.pt (the best model so far by
validation loss, which the next stage reads) and pretrain.last.pt (where --resume continues).
"""

import functools, math, time
from dataclasses import dataclass, replace

import numpy as np
import torch

from model import (LanguageModel, ModelConfig, Optimizer, Run, TrainConfig, clip_gradients,
                   learning_rate_factor, load_checkpoint, load_config, matrix_rate, option)
from prepare import (bits_per_byte, load_tokenizer, load_tokens, random_stream, scorecard)

@dataclass
class PretrainConfig(ModelConfig, TrainConfig):
    table = "pretrain"  # no annotation, so no option: the stage's name, and its [table] in a config
    max_steps: int = option(550, "optimizer steps", low=1)
    batch_size: int = option(16, "sequences a step, over all processes", low=1)
    micro_batch_size: int = option(16, "sequences that a process computes at once", low=1)
    learning_rate: float = option(5e-3, "peak rate of AdamW (embeddings, norms)", low=0)
    muon_learning_rate: float = option(0.02, "peak rate of Muon; 0: AdamW for all weights", low=0)
    muon_momentum: float = option(0.8, "momentum of Muon; 0.95 for large batches", low=0, high=1)
    weight_decay: float = option(0.01, "decay of the matrices", low=0)
    eval_every: int = option(275, "steps between evaluations and checkpoints", low=1)
    recompute: bool = option(False, "keep only block inputs: less memory, a third more arithmetic")
    compile: bool = option(False, "torch.compile the model: faster steps after a slow start")

@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(n_windows, block_size, seed, epoch):
    """An epoch's random offset, so that windows differ from epoch to epoch, and their order."""
    rng = random_stream(seed, "pretraining", epoch)
    return rng.integers(block_size), rng.permutation(n_windows)

def get_batch(tokens, step, config):
    """The inputs x and targets y of one step, both (batch_size, block_size): windows of the text,
    and the same windows one token further. They depend on the seed and the step alone."""
    B, T = config.batch_size, config.block_size
    n_windows = (len(tokens) - 1) // T - 1  # one fewer than fit: room for the offset
    windows = []
    for i in range(step * B, (step + 1) * B):
        epoch, index = divmod(i, n_windows)
        offset, order = epoch_order(n_windows, T, config.seed, epoch)
        start = offset + order[index] * T
        windows.append(tokens[start:start + T + 1])
    windows = torch.from_numpy(np.stack(windows).astype(np.int64))                     # (B, T + 1)
    return windows[:, :-1], windows[:, 1:]

def flops_per_token(model):
    """Floating-point operations of a forward and a backward pass for each token, counted as in PaLM
    (Chowdhery et al. 2022, appendix B): 6 for each weight of a matrix product, and 12·H·D·T in each
    block for attention."""
    c = model.model.config
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 6 * weights + 12 * c.n_layer * c.n_head * c.head_dim * c.block_size

def main():
    config = load_config(PretrainConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    tokens, data = load_tokens(config.out_dir, "train", tokenizer)
    run = Run(config)
    if len(tokens) < 18:
        raise SystemExit(f"{len(tokens)} tokens are too few to train on")
    if len(tokens) < 2 * config.block_size + 2:
        config = replace(config, block_size=len(tokens) // 2 - 1)
        run.log(None, f"{len(tokens)} tokens are few: only a context of {config.block_size} fits")
    shape = {name: getattr(config, name) for name in ModelConfig.__dataclass_fields__}
    model = LanguageModel(ModelConfig(**shape | dict(vocab_size=tokenizer.size))).to(run.device)
    model.model.recompute = config.recompute
    optimizer = Optimizer(model, config.learning_rate, config.muon_learning_rate,
                          config.weight_decay, momentum=config.muon_momentum, dtype=run.dtype)
    checkpoint = run.start(tokenizer.hash, model=model, optimizer=optimizer)
    step, best = checkpoint.get("step", 0), checkpoint.get("best", math.inf)
    ddp_model = run.wrap(torch.compile(model, dynamic=False) if config.compile else model)

    n_targets = config.batch_size * config.block_size  # of the whole batch, whoever computes it
    flops, peak = flops_per_token(model), matrix_rate(run.device, run.dtype) * run.world
    to_nats = math.log(2) * data["val"]["bytes"] / data["val"]["characters"]  # from bits per byte
    origin = dict(tokenizer=tokenizer.hash, parent="train.bin")
    if run.main:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokens):,} tokens; "
              f"matrix products reach {peak / 1e9:.0f} GFLOP/s here")

    clock, last_logged = time.time(), step
    while step < config.max_steps:
        x, y = get_batch(tokens, step, config)                                         # (B, T) both
        loss = 0.0
        for rows in run.micro_batches(config.batch_size, ddp_model):
            inputs, targets = x[rows].to(run.device), y[rows].to(run.device)
            with run.autocast():
                part = ddp_model(inputs, targets, dense=True).sum() / n_targets
            # DDP averages gradients over the processes; the parts of a mean must be added up.
            (part * run.world).backward()
            loss += part.detach()
        norm = clip_gradients(model, config.gradient_clip, step)
        optimizer.step(learning_rate_factor(step, config.max_steps, config.warmup_steps))
        step += 1

        if step % 20 == 0 or step in (1, config.max_steps):
            loss = float(run.sum(loss))
            rate = (step - last_logged) * n_targets / (time.time() - clock)
            left = (config.max_steps - step) * n_targets / rate
            run.log(step, f"step {step:5}/{config.max_steps}  loss {loss:.4f}  grad {norm:.2f}  "
                    f"{rate:,.0f} tokens/s  MFU {flops * rate / peak:.0%}  {left:.0f} s to go",
                    loss=loss, gradient_norm=norm, tokens_per_s=rate, mfu=flops * rate / peak)
            clock, last_logged = time.time(), step
        due = step % config.eval_every == 0 or step == config.max_steps
        if due:
            bits = bits_per_byte(model, run)
            text = f"validation {bits:.4f} bits per byte, {bits * to_nats:.4f} nats per character"
            run.log(step, f"step {step:5}  {text}", bits_per_byte=bits)
            if bits < best:
                best = bits
                run.save("pretrain.pt", model, step, **origin)
            clock, last_logged = time.time(), step
        run.save_last(due, model, step, optimizer=optimizer.state_dict(), best=best, **origin)

    model.load_state_dict(load_checkpoint(run.path("pretrain.pt"), "python pretrain.py")["model"])
    scorecard(run, model, tokenizer, nats_per_character=round(best * to_nats, 4))

if __name__ == "__main__":
    main()
