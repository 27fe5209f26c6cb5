"""Stage 2, supervised fine-tuning: the pretrained model learns to answer, from demonstrations.

    loss = -1/N · Σ log p(token t+1 | tokens ≤ t)      over the N tokens that the *assistant* says

It is pretraining's loss with a mask (Ouyang et al. 2022, "InstructGPT", step 1): the prompt is read
but not learned; the <|im_end|> that closes an answer is learned, so that the model comes to stop.

    python sft.py          or, on eight GPUs:    torchrun --nproc_per_node=8 sft.py --config=…

It reads pretrain.pt and sft.jsonl and writes sft.pt (the best by validation loss) and sft.last.pt.
"""

import math
from dataclasses import dataclass

from model import (IGNORE, LanguageModel, Optimizer, Run, TrainConfig, clip_gradients,
                   learning_rate_factor, load_checkpoint, load_config, option, pad, restore)
from prepare import (epoch_batches, load_tokenizer, random_stream, read_jsonl, render, scorecard)

@dataclass
class SFTConfig(TrainConfig):
    table = "sft"
    epochs: int = option(6, "passes over the demonstrations", low=1)
    learning_rate: float = option(2e-3, "peak rate of AdamW", low=0)
    val_share: float = option(0.1, "share that is held out for validation", low=0.001, high=0.5)

def make_example(tokenizer, messages):
    """A conversation → ids, and targets: ids[t + 1] at t if the assistant says it, else IGNORE."""
    ids, trained = render(tokenizer, messages)
    targets = [token if learn else IGNORE for token, learn in zip(ids[1:], trained[1:])]
    return ids[:-1], targets

def make_batch(examples, device):
    """Examples → ids (B, T), padded with 0, and targets (B, T), padded with IGNORE."""
    ids = pad([ids for ids, _ in examples])
    targets = pad([targets for _, targets in examples], IGNORE)
    return ids.to(device), targets.to(device)

def validation_loss(model, examples, run):
    """The mean loss over all target tokens of the held-out conversations."""
    loss, count, size = 0.0, 0.0, run.config.micro_batch_size
    mine = [examples[i] for i in run.share(len(examples))]
    for i in range(0, len(mine), size):
        ids, targets = make_batch(mine[i:i + size], run.device)
        with run.evaluating(model):
            loss += model(ids, targets).sum().item()
        count += (targets != IGNORE).sum().item()
    return run.sum(loss) / run.sum(count)

def load_examples(config, tokenizer, block_size):
    """The demonstrations of sft.jsonl that fit the context, as (validation, training) examples."""
    path = f"{config.out_dir}/sft.jsonl"
    made = [make_example(tokenizer, r["messages"]) for r in read_jsonl(path, fields=("messages",))]
    examples = [example for example in made if len(example[0]) <= block_size]
    if len(examples) < max(2, len(made) / 2):
        raise SystemExit(f"{path}: only {len(examples)} of {len(made)} examples fit the context: "
                         "pretrain with a larger --block_size, or prepare more --demonstrations")
    n_validation = max(1, round(len(examples) * config.val_share))
    return examples[:n_validation], examples[n_validation:]  # they are in random order

def main():
    config = load_config(SFTConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    parent = load_checkpoint(f"{config.out_dir}/pretrain.pt", "python pretrain.py", tokenizer.hash)
    validation, examples = load_examples(config, tokenizer, parent["model_config"].block_size)
    run = Run(config)
    model = restore(LanguageModel, parent, run.device)
    optimizer = Optimizer(model, config.learning_rate, config.muon_learning_rate,
                          config.weight_decay, dtype=run.dtype)
    checkpoint = run.start(tokenizer.hash, model=model, optimizer=optimizer)
    step, best = checkpoint.get("step", 0), checkpoint.get("best", math.inf)
    ddp_model = run.wrap(model)

    lengths = [len(ids) for ids, _ in examples]
    batch_size = min(config.batch_size, len(examples))
    steps_per_epoch = len(examples) // batch_size
    steps = config.epochs * steps_per_epoch
    origin = dict(tokenizer=tokenizer.hash, parent="pretrain.pt")
    if run.main:
        print(f"{len(examples)} conversations, {batch_size} a step; {len(validation)} held out")

    batches = None  # made when an epoch begins, or when --resume lands inside one
    while step < steps:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or batches is None:
            batches = epoch_batches(lengths, batch_size, random_stream(config.seed, "sft", epoch))
        ids, targets = make_batch([examples[i] for i in batches[index]], run.device)   # (B, T) both
        n_targets = (targets != IGNORE).sum()  # of the whole batch, whoever computes its rows
        loss = 0.0
        for rows in run.micro_batches(batch_size, ddp_model):
            with run.autocast():
                part = ddp_model(ids[rows], targets[rows]).sum() / n_targets
            (part * run.world).backward()  # DDP averages gradients; we want their sum
            loss += part.detach()
        clip_gradients(model, config.gradient_clip, step)
        optimizer.step(learning_rate_factor(step, steps, config.warmup_steps))
        step += 1

        if step % 20 == 0 or step == 1:
            loss = float(run.sum(loss))
            run.log(step, f"step {step:4}/{steps}  loss {loss:.4f}", loss=loss)
        due = step % steps_per_epoch == 0
        if due:
            val_loss = validation_loss(model, validation, run)
            run.log(step, f"step {step:4}/{steps}  validation {val_loss:.4f}", val_loss=val_loss)
            if val_loss < best:
                best = val_loss
                run.save("sft.pt", model, step, **origin)
        run.save_last(due, model, step, optimizer=optimizer.state_dict(), best=best, **origin)

    model.load_state_dict(load_checkpoint(run.path("sft.pt"), "python sft.py")["model"])
    scorecard(run, model, tokenizer, val_loss=round(best, 4))

if __name__ == "__main__":
    main()
