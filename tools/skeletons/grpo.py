"""Group relative policy optimisation (Shao et al. 2024): PPO without a value function.

    A = (r - mean of r) / (standard deviation of r)       over the responses to the same prompt
    loss = mean over tokens of   max(-Aρ, -A clip(ρ, 1 ± ε)) + β·k3,          ρ = π/π_old
    k3 = π_SFT/π - 1 - log π_SFT/π

Several responses to a prompt are each other's baseline, and every token of a response has the same
advantage. The KL penalty is part of the loss, not of the reward: without it the policy would go
wherever the reward model is wrong.

    python grpo.py         reads sft.pt, reward.pt and prompts.jsonl, writes grpo.pt
"""

from dataclasses import dataclass

import torch

from model import (IGNORE, LanguageModel, Optimizer, Run, ScalarModel, TrainConfig, clip_gradients,
                   learning_rate_factor, load_checkpoint, load_config, option, restore)
from prepare import (join, load_tokenizer, prompt_ids, random_stream, read_prompts, respond,
                     rubric_score, scorecard)

@dataclass
class GRPOConfig(TrainConfig):
    table = "grpo"
    max_steps: int = option(40, "iterations: a rollout, then its updates", low=1)
    n_prompts: int = option(16, "prompts an iteration", low=1)
    n_samples: int = option(6, "responses to each prompt", low=2)
    minibatch_size: int = option(24, "responses an optimizer step", low=1)
    micro_batch_size: int = option(64, "responses a process computes at once", low=1)
    epochs: int = option(2, "passes over each rollout", low=1)
    learning_rate: float = option(3e-4, "peak rate, annealed to 0", low=0)
    warmup_steps: int = option(0, "iterations of linear warm-up", low=0)
    kl_coefficient: float = option(0.1, "β: the weight of the KL penalty in the loss", low=0)
    clip: float = option(0.2, "the probability ratio is clipped to 1 ± this", low=0)
    missing_end_penalty: float = option(1.0, "score lost by a response that does not end", low=0)

def group_advantages(scores, n_samples):
    """(B,) scores, of which each n_samples that follow each other belong to a prompt → (B,)
    advantages: whitened within each prompt. Where all scores are equal they are 0, not nan."""
    raise NotImplementedError("group_advantages")

def token_loss(logprobs, old_logprobs, ref_logprobs, advantages, clip, kl_coefficient):
    """The loss of each token, (B, T). All log-probabilities are (B, T), advantages (B, 1)."""
    raise NotImplementedError("token_loss")

def log_probabilities(model, tokens, targets, run):
    with run.evaluating(model):
        return -model(tokens, targets)                                                 # (B, T)

def update(run, config, policy, ddp_policy, optimizer, rollout, step):
    """Update the policy on one rollout: epochs of minibatches, as in ppo.py."""
    tokens, targets, old, ref, advantages = rollout
    mask, rng = targets != IGNORE, random_stream(config.seed, "minibatches", step)
    for _ in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(tokens))).to(run.device)
        for start in range(0, len(tokens), config.minibatch_size):
            chosen = order[start:start + config.minibatch_size]
            n_tokens = mask[chosen].sum()  # of the whole minibatch, whoever computes its rows
            for rows in run.micro_batches(len(chosen), ddp_policy):
                i = chosen[rows]
                with run.autocast():
                    logprobs = -ddp_policy(tokens[i], targets[i])                      # (b, T)
                losses = token_loss(logprobs, old[i], ref[i], advantages[i, None], config.clip,
                                    config.kl_coefficient)
                ((losses * mask[i]).sum() / n_tokens * run.world).backward()
            clip_gradients(policy, config.gradient_clip, step)
            optimizer.step(learning_rate_factor(step, config.max_steps, config.warmup_steps))

def main():
    config = load_config(GRPOConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    run = Run(config)
    sft = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    reward = load_checkpoint(run.path("reward.pt"), "python reward.py", tokenizer.hash)
    policy, reference = (restore(LanguageModel, sft, run.device) for _ in range(2))
    reward_model = restore(ScalarModel, reward, run.device)
    records = read_prompts(run, tokenizer, policy.model.config.block_size, "ppo")
    optimizer = Optimizer(policy, config.learning_rate, betas=(0.9, 0.999), eps=1e-5)
    checkpoint = run.start(tokenizer.hash, model=policy, optimizer=optimizer)
    step, figures = checkpoint.get("step", 0), checkpoint.get("figures", {})
    ddp_policy, origin = run.wrap(policy), dict(tokenizer=tokenizer.hash, parent="sft.pt")

    while step < config.max_steps:
        rng = random_stream(config.seed, "grpo prompts", step)
        chosen = rng.choice(len(records), config.n_prompts)
        batch = [records[i] for i in chosen for _ in range(config.n_samples)]
        responses = respond(policy, tokenizer, batch, run, ("grpo", step))
        prompts = [prompt_ids(tokenizer, record["prompt"]) for record in batch]
        tokens, targets, lengths = join(prompts, responses, run.device)
        old = log_probabilities(policy, tokens, targets, run)
        ref = log_probabilities(reference, tokens, targets, run)
        with run.evaluating(reward_model):
            scores = reward_model(tokens, lengths)                                     # (B,)
        ended = torch.tensor([tokenizer.end in ids for ids in responses], device=run.device)
        advantages = group_advantages(scores - config.missing_end_penalty * ~ended,
                                      config.n_samples)
        rollout = tokens, targets, old, ref, advantages
        update(run, config, policy, ddp_policy, optimizer, rollout, step)
        step += 1

        gold = [rubric_score(record, tokenizer.text(ids), tokenizer.end in ids)
                for record, ids in zip(batch, responses)]
        figures = dict(reward=scores.mean().item(), gold=sum(gold) / len(gold),
                       kl=(old - ref).sum(1).mean().item())
        run.log(step, f"step {step:3}/{config.max_steps}  reward {figures['reward']:6.3f}  gold "
                f"{figures['gold']:6.3f}  KL {figures['kl']:5.2f}", **figures)
        run.save_last(step % 10 == 0, policy, step, figures=figures,
                      optimizer=optimizer.state_dict(), **origin)

    run.save("grpo.pt", policy, step, **origin)
    scorecard(run, policy, tokenizer, kl=figures["kl"])  # of the last rollout, as in ppo.py

if __name__ == "__main__":
    main()
