"""Stage 2, supervised fine-tuning: the pretrained model learns to answer, from prompt–response pairs.

    loss = -1/N · Σ log p(token t+1 | tokens ≤ t)      over the N tokens of the batch that the *assistant* says

It is pretraining's loss with a mask (Ouyang et al. 2022, "InstructGPT", step 1): the prompt is read but not learned,
the <|im_end|> that closes an answer is, so that the model learns to stop.

    python sft.py                                torchrun --nproc_per_node=8 sft.py --config=…

It reads pretrain.pt and sft.jsonl and writes sft.pt (best by validation loss) and sft.last.pt (for --resume).
"""

import math
from dataclasses import dataclass

from model import (IGNORE, LanguageModel, Optimizers, Run, TrainConfig, epoch_batches, learning_rate_factor,
                   load_checkpoint, load_config, option, pad, restore)
from prepare import as_messages, load_tokenizer, read_jsonl, render, scorecard


@dataclass
class SFTConfig(TrainConfig):
    table = "sft"
    epochs: int = option(6, "passes over the demonstrations", low=1)
    learning_rate: float = option(2e-3, "peak rate of AdamW", low=0)
    val_share: float = option(0.1, "share of the demonstrations held out for validation", low=0.001, high=0.5)


def make_example(tokenizer, messages):
    """A conversation as (ids, targets): targets[t] is ids[t + 1] where the assistant says it, else IGNORE."""
    ids, trained = render(tokenizer, messages)
    return ids[:-1], [t if say else IGNORE for t, say in zip(ids[1:], trained[1:])]


def make_batch(examples, device):
    """Examples → ids (B, T) padded with 0, targets (B, T) padded with IGNORE."""
    ids, targets = zip(*examples)
    return pad(ids).to(device), pad(targets, IGNORE).to(device)


def validation_loss(model, examples, run):
    """Mean over all target tokens of the held-out conversations."""
    def sums(part):
        ids, targets = make_batch([examples[i] for i in part], run.device)
        return [(model(ids, targets).sum().item(), (targets != IGNORE).sum().item())]

    losses, counts = zip(*run.evaluate(sums, len(examples), 64))
    return sum(losses) / sum(counts)


def main():
    config = load_config(SFTConfig, __doc__)
    with Run(config, "sft") as run:
        tokenizer = load_tokenizer(config.out_dir)
        parent = load_checkpoint(run.path("pretrain.pt"), "python pretrain.py", tokenizer.hash)
        block_size = parent["model_config"].block_size
        records = read_jsonl(run.path("sft.jsonl"), check=lambda r: as_messages(dict(messages=r["messages"]), ""))
        made = [make_example(tokenizer, record["messages"]) for record in records]
        if len(made) < 2:
            raise SystemExit(f"{run.path('sft.jsonl')} holds {len(made)} conversations, too few to learn from: run "
                             "python prepare.py with --text=… --demonstrations=…")
        examples = [e for e in made if len(e[0]) <= block_size]
        if len(examples) < max(2, len(made) / 2):
            raise SystemExit(f"{len(made) - len(examples)} of {len(made)} conversations are longer than the context of "
                             f"{block_size} tokens: pretrain with a larger --block_size")
        n_val = max(1, round(len(examples) * config.val_share))
        validation, examples = examples[:n_val], examples[n_val:]
        lengths, steps_per_epoch = [len(ids) for ids, _ in examples], math.ceil(len(examples) / config.batch_size)

        model = restore(LanguageModel, parent, run.device)
        optimizer = Optimizers(model, config.learning_rate, config.muon_learning_rate, config.weight_decay)
        checkpoint = run.start(tokenizer, "pretrain: pretrain.pt", model=model, optimizer=optimizer)
        step, best, steps = checkpoint["step"], checkpoint["best"], config.epochs * steps_per_epoch
        trained = run.wrap(model)
        if run.main:
            n_targets = sum(t != IGNORE for _, targets in examples for t in targets)
            print(f"{len(examples)} conversations to learn from, {n_val} held out, {len(made) - len(examples) - n_val} "
                  f"too long; {n_targets:,} of {sum(lengths):,} tokens are the assistant's")

        while step < steps:
            epoch, index = divmod(step, steps_per_epoch)
            batch = epoch_batches(lengths, config.batch_size, (config.seed, epoch))[index]
            ids, targets = make_batch([examples[i] for i in batch], run.device)                 # (B, T) both
            n_targets = (targets != IGNORE).sum()                # of the whole batch, whoever computes its rows
            loss = run.backward(trained, len(batch), config.micro_batch_size, lambda rows:
                                trained(ids[rows], targets[rows]).sum() / n_targets)
            run.update(model, optimizer, loss, step, config, learning_rate_factor(step, steps, config.warmup_steps))
            step += 1

            if step % 20 == 0 or step == 1:
                run.log(step, f"step {step:4}/{steps}  loss {loss:.4f}", loss=loss)
            if due := step % steps_per_epoch == 0:
                val = validation_loss(model, validation, run)
                run.log(step, f"step {step:4}/{steps}  validation loss {val:.4f}" + " (best so far)" * (val < best),
                        val_loss=val)
                if val < best:
                    best = val
                    run.save("sft.pt", step, best)
            run.pause(step, steps, due, best)

        model.load_state_dict(load_checkpoint(run.path("sft.pt"), "python sft.py")["model"])
        scorecard(run, "sft", model, tokenizer, val_loss=round(best, 4))
        if run.main:
            print("next: python reward.py")


if __name__ == "__main__":
    main()
