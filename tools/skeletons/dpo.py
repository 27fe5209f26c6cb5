"""Direct preference optimisation (Rafailov et al. 2023): learn from rankings without reward model
and without sampling.

    loss of a prompt = -1/pairs · Σ log σ(β·(h_i - h_j))     over all pairs with i ranked above j
    h = log π(response | prompt) - log π_SFT(response | prompt)

The optimum of PPO's objective is π ∝ π_SFT·exp(r/β), so β·h is a reward up to a constant of the
prompt. Putting it into the reward model's loss trains the policy itself: a whole LanguageModel,
which starts as the SFT model. The SFT model stays as the reference.

    python dpo.py          reads sft.pt and rankings.jsonl, writes dpo.pt
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: F401  (for dpo_loss)

from model import (LanguageModel, Optimizer, Run, TrainConfig, clip_gradients, learning_rate_factor,
                   load_checkpoint, load_config, option, restore)
from prepare import (epoch_batches, join, load_tokenizer, prompt_ids,
                     random_stream, read_judged, read_rankings, respond, scorecard)

@dataclass
class DPOConfig(TrainConfig):
    table = "dpo"
    beta: float = option(0.5, "β: how much a nat of distance from the SFT model is worth", low=0)
    epochs: int = option(1, "passes over the rankings", low=1)
    batch_size: int = option(16, "prompts a step, each with all its responses", low=1)
    micro_batch_size: int = option(16, "prompts that a process computes at once", low=1)
    learning_rate: float = option(3e-4, "peak rate", low=0)

def log_probability(model, tokens, targets):
    """log p of each whole response, (N,). tokens and targets (N, T) as `join` makes them; a
    LanguageModel that is given targets returns the loss of each, -log p, which is 0 elsewhere."""
    raise NotImplementedError("log_probability")

def dpo_loss(h, ranks, beta):
    """The loss of each prompt, (P,). h (P, K): log π - log π_SFT of its responses; ranks (P, K): 0
    is best, equal numbers are ties, -1 is padding, as in reward.py's ranking_loss. Ties and padding
    count in neither sum nor divisor; a prompt without an ordered pair costs 0."""
    raise NotImplementedError("dpo_loss")

def make_batch(rankings, tokenizer, device):
    """tokens and targets (N, T) of all responses of P rankings, and their ranks (P, K)."""
    prompts, responses, ranks = [], [], []
    K = max(len(r["responses"]) for r in rankings)
    for r in rankings:
        place = {i: rank for rank, group in enumerate(r["ranking"]) for i in group}
        prompts += [prompt_ids(tokenizer, r["prompt"])] * len(place)
        responses += [response["tokens"] for response in r["responses"]]
        ranks.append([place.get(i, -1) for i in range(K)])
    tokens, targets, _ = join(prompts, responses, device)
    return tokens, targets, torch.tensor(ranks, device=device)

def batch_loss(policy, reference, rankings, config, tokenizer, run):
    """The sum of the losses of some prompts."""
    tokens, targets, ranks = make_batch(rankings, tokenizer, run.device)
    with run.evaluating(reference):
        ref = log_probability(reference, tokens, targets)                              # (N,)
    with run.autocast():
        new = log_probability(policy, tokens, targets)                                 # (N,)
    h = new.new_zeros(ranks.shape).masked_scatter(ranks >= 0, new - ref)               # (P, K)
    return dpo_loss(h, ranks, config.beta).sum()

def distance(policy, reference, tokenizer, run):
    """KL(π‖π_SFT) in nats a response, estimated on responses of π to the held-out prompts."""
    records, total = read_judged(run.path("eval.jsonl")), 0.0
    responses = respond(policy, tokenizer, records, run, ("distance",))
    for i in range(0, len(records), 64):
        prompts = [prompt_ids(tokenizer, record["prompt"]) for record in records[i:i + 64]]
        tokens, targets, _ = join(prompts, responses[i:i + 64], run.device)
        with run.evaluating(policy), run.evaluating(reference):
            total += (reference(tokens, targets) - policy(tokens, targets)).sum().item()
    return total / len(records)

def main():
    config = load_config(DPOConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    run = Run(config)
    sft = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    policy, reference = (restore(LanguageModel, sft, run.device) for _ in range(2))
    rankings = read_rankings([run.path("rankings.jsonl")], tokenizer)
    rankings = [r for r in rankings if len(r["ranking"]) > 1]
    lengths = [max(len(response["tokens"]) for response in r["responses"]) for r in rankings]
    optimizer = Optimizer(policy, config.learning_rate)
    step = run.start(tokenizer.hash, model=policy, optimizer=optimizer).get("step", 0)
    ddp_policy, origin = run.wrap(policy), dict(tokenizer=tokenizer.hash, parent="sft.pt")

    steps_per_epoch, batches = len(rankings) // config.batch_size, None
    steps = config.epochs * steps_per_epoch
    while step < steps:
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0 or batches is None:
            rng = random_stream(config.seed, "dpo", epoch)
            batches = epoch_batches(lengths, config.batch_size, rng)
        batch, loss = [rankings[i] for i in batches[index]], 0.0
        for rows in run.micro_batches(len(batch), ddp_policy):
            part = batch_loss(ddp_policy, reference, batch[rows], config, tokenizer, run)
            part = part / len(batch)
            (part * run.world).backward()  # DDP averages gradients; we want their sum
            loss += part.detach()
        clip_gradients(policy, config.gradient_clip, step)
        optimizer.step(learning_rate_factor(step, steps, config.warmup_steps))
        step += 1
        if step % 20 == 0 or step in (1, steps):
            loss = float(run.sum(loss))
            run.log(step, f"step {step:4}/{steps}  loss {loss:.4f}", loss=loss)
        run.save_last(step % 100 == 0, policy, step, optimizer=optimizer.state_dict(), **origin)

    run.save("dpo.pt", policy, step, **origin)
    scorecard(run, policy, tokenizer, kl=distance(policy, reference, tokenizer, run))

if __name__ == "__main__":
    main()
