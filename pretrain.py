"""Stage 1, pretraining: a Transformer learns to predict the next token of plain text.

    loss = -1/N · Σ log p(token t+1 | tokens ≤ t)      over all N tokens of the batch

    python pretrain.py                                          one process: laptop CPU, or one GPU
    torchrun --nproc_per_node=8 pretrain.py --config=…          eight GPUs of one machine, same batches, same result

It reads train.bin and val.bin of the run folder and writes pretrain.pt (the best model so far by validation loss, for
the next stage) and pretrain.last.pt (where --resume goes on).
"""

import math
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch

from model import (LanguageModel, ModelConfig, Optimizers, Run, TrainConfig, learning_rate_factor, load_checkpoint,
                   load_config, matrix_rate, option)
from prepare import bits_per_byte, held_out_prompts, load_tokenizer, load_tokens, prompt_ids, scorecard


@dataclass
class PretrainConfig(ModelConfig, TrainConfig):
    table = "pretrain"
    max_steps: int = option(550, "optimizer steps", low=1)
    batch_size: int = option(16, "sequences a step, over all processes", low=1)
    micro_batch_size: int = option(16, "sequences that a GPU, or a CPU's thread, computes at once", low=1)
    learning_rate: float = option(5e-3, "peak rate of AdamW (embeddings, norms)", low=0)
    muon_learning_rate: float = option(0.02, "peak rate of Muon (matrices of the blocks); 0: AdamW for all", low=0)
    muon_momentum: float = option(0.8, "momentum of Muon; 0.95 for large batches", low=0, high=1)
    weight_decay: float = option(0.01, "decay of the matrices", low=0)
    eval_every: int = option(275, "steps between evaluations and checkpoints", low=1)
    shard_optimizer: bool = option(False, "each process keeps a part of the optimizer's state: less memory on many")
    recompute: bool = option(False, "keep no activations within blocks: less memory, a third more arithmetic")
    compile: bool = option(False, "torch.compile the model: faster steps after a slow start")


def get_batch(tokens, step, config):
    """The (batch_size, block_size + 1) token windows of one step: a function of the seed and the step alone.

    Each epoch cuts the text into windows at another offset and visits them in another order, each once."""
    B, T = config.batch_size, config.block_size
    n_windows = (len(tokens) - 1) // T - 1
    windows = []
    for i in range(step * B, (step + 1) * B):
        epoch, index = divmod(i, n_windows)
        if not windows or index == 0:
            rng = np.random.default_rng((config.seed, epoch))
            offset, order = rng.integers(T), rng.permutation(n_windows)
        start = offset + order[index] * T
        windows.append(tokens[start:start + T + 1])
    return torch.from_numpy(np.stack(windows).astype(np.int64))


def flops_per_token(model, T):
    """Multiply-adds of forward and backward pass, counted as in Chowdhery et al. 2022 (PaLM), appendix B: 6 for each
    weight in a matrix product and 12·n_layer·C·T for attention."""
    c = model.model.config
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    return 6 * matrices + 12 * c.n_layer * c.n_embd * T


def memory_needed(model, config, run):
    """Bytes of PyTorch itself, weights, two moments, and of each thread's gradients, bfloat16 weights and activations.

    A block keeps about 12 vectors of its width and 4 of the MLP's for each token, and where attention is made of matrix
    products its table; with recompute, its input alone. The logits become their gradient. An estimate."""
    c, T, size = model.model.config, config.block_size, run.dtype.itemsize
    half, parameters = run.dtype != torch.float32, sum(p.numel() for p in model.parameters())
    kept = 12 * c.n_embd + 4 * c.n_inner + c.n_head * T * (half and run.device.type == "cpu")
    activations = size * (c.n_layer * (c.n_embd if config.recompute else kept) + c.vocab_size)
    tokens = T * min(config.batch_size, run.threads * config.micro_batch_size)
    return 3e8 + parameters * (12 + run.threads * (4 + size * half)) + tokens * activations


def main():
    config = load_config(PretrainConfig, __doc__)
    with Run(config, "pretrain") as run:
        tokenizer = load_tokenizer(config.out_dir)
        tokens, data = load_tokens(config.out_dir, "train")
        if data["tokenizer"] != tokenizer.hash:
            raise SystemExit(f"{config.out_dir}/train.bin was made with another tokenizer than tokenizer.tiktoken: run "
                             "python prepare.py again")
        if len(tokens) < 2 * config.block_size + 2:
            raise SystemExit(f"train.bin has {len(tokens)} tokens, too few for --block_size={config.block_size}: "
                             "prepare more text or choose a smaller block_size")
        longest = max((len(prompt_ids(tokenizer, r["prompt"])) for r in held_out_prompts(config.out_dir)), default=0)
        if longest >= config.block_size:
            raise SystemExit(f"--block_size={config.block_size}: a held-out prompt of {longest} tokens does not fit; "
                             "choose a larger one")
        config.vocab_size = tokenizer.size
        model_config = ModelConfig(**{k: v for k, v in asdict(config).items() if k in ModelConfig.__dataclass_fields__})
        model = LanguageModel(model_config).to(run.device)
        model.model.recompute = config.recompute
        optimizer = Optimizers(model, config.learning_rate, config.muon_learning_rate, config.weight_decay,
                               muon_momentum=config.muon_momentum, shard=config.shard_optimizer)
        checkpoint = run.start(tokenizer, "prepare: train.bin", model=model, optimizer=optimizer)
        step, best = checkpoint["step"], checkpoint["best"]
        trained = run.wrap(torch.compile(model) if config.compile else model)
        flops = flops_per_token(model, config.block_size)
        peak = sum(run.map(lambda _: matrix_rate(run.device, run.dtype), range(run.threads))) * run.world
        if run.main:
            print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {len(tokens):,} tokens of text, of which"
                  f" {config.max_steps * config.batch_size * config.block_size / len(tokens):.1f} epochs are read; "
                  f"matrix products reach {peak / 1e9:.0f} GFLOP/s here; each process needs about "
                  f"{memory_needed(model, config, run) / 1e9:.2f} GB")

        n_targets = config.batch_size * config.block_size
        nats = math.log(2) * data["val"]["bytes"] / data["val"]["characters"]  # a bit per byte in nats per character
        clock, last_logged = time.time(), step
        while step < config.max_steps:
            batch = get_batch(tokens, step, config).to(run.device)                              # (B, T+1)
            loss = run.backward(trained, config.batch_size, config.micro_batch_size, lambda rows:
                                trained(batch[rows, :-1], batch[rows, 1:]).sum() / n_targets)
            norm = run.update(model, optimizer, loss, step, config,
                              learning_rate_factor(step, config.max_steps, config.warmup_steps))
            step += 1

            if step % 20 == 0 or step in (1, config.max_steps):
                seconds, done = time.time() - clock, (step - last_logged) * n_targets
                run.log(step, f"step {step:5}/{config.max_steps}  loss {loss:.4f}  grad {norm:.2f}  "
                        f"{done / seconds:,.0f} tokens/s  MFU {flops * done / seconds / peak:.0%}  "
                        f"{(config.max_steps - step) * seconds / (step - last_logged):.0f} s to go",
                        loss=loss, gradient_norm=norm, tokens_per_s=done / seconds, mfu=flops * done / seconds / peak)
                clock, last_logged = time.time(), step
            if due := step % config.eval_every == 0 or step == config.max_steps:
                bpb = bits_per_byte(model, run)
                run.log(step, f"step {step:5}  validation {bpb:.4f} bits per byte, {bpb * nats:.4f} nats per character"
                        + (" (best so far)" if bpb < best else ""), bits_per_byte=bpb)
                if bpb < best:
                    best = bpb
                    run.save("pretrain.pt", step, best)
            if run.pause(step, config.max_steps, due, best):
                clock, last_logged = time.time(), step

        model.load_state_dict(load_checkpoint(run.path("pretrain.pt"), "python pretrain.py")["model"])
        figures = scorecard(run, "pretrain", model, tokenizer, nats_per_character=round(best * nats, 4))
        if run.main:
            print(f"{data['byte_entropy'] / figures['bits_per_byte']:.1f} times below the entropy of single bytes "
                  f"({data['byte_entropy']:.2f} bits); next: python sft.py")


if __name__ == "__main__":
    main()
