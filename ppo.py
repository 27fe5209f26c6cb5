"""Stage 4, RLHF (reinforcement learning from human feedback): PPO, proximal policy optimisation,
tunes the SFT model to earn the reward model's score.

    maximise  E[ r(prompt, response) - β · log(π(response) / π_SFT(response)) ],   response ~ π

Each iteration samples responses to some prompts (the rollout), scores them, estimates how much
better each token was than expected (the advantage), and makes better tokens likelier, within a
clipped distance of the policy that sampled them (Schulman et al. 2017; Ouyang et al. 2022, step 3;
details as in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO").

Four models take part. Two are trained: the policy π, which starts as the SFT model, and the value
function V, which foretells at each token the reward still to come, and starts as the reward model.
Two stay as they are: the SFT model as the reference, and the reward model.

    python ppo.py                                torchrun --nproc_per_node=8 ppo.py --config=…

It reads sft.pt, reward.pt and prompts.jsonl and writes ppo.pt and ppo.last.pt (for --resume).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model import (IGNORE, LanguageModel, Optimizer, Run, ScalarModel, TrainConfig, clip_gradients,
                   learning_rate_factor, load_checkpoint, load_config, option, restore)
from prepare import (join, load_tokenizer, load_tokens, prompt_ids, random_stream, read_prompts,
                     respond, rubric_score, scorecard)

@dataclass
class PPOConfig(TrainConfig):
    table = "ppo"
    variant: str = option("", "a name: the policy becomes ppo-NAME.pt, beside others")
    reward: str = option("", "the variant of the reward model to please, reward-NAME.pt")
    max_steps: int = option(40, "iterations: a rollout, then its updates", low=1)
    batch_size: int = option(96, "responses an iteration, over all processes", low=1)
    minibatch_size: int = option(24, "responses an optimizer step, over all processes", low=1)
    micro_batch_size: int = option(64, "responses a process scores or trains on at once", low=1)
    epochs: int = option(2, "passes over each rollout", low=1)
    learning_rate: float = option(3e-4, "peak rate of the policy, annealed to 0", low=0)
    value_learning_rate: float = option(1e-3, "peak rate of the value function", low=0)
    warmup_steps: int = option(0, "iterations of linear warm-up", low=0)
    kl_coefficient: float = option(0.1, "β: reward lost per nat of log π/π_SFT", low=0)
    kl_stop: float = option(0.0, "end an update at this approx_kl, a mean per token; 0: no", low=0)
    ptx_coefficient: float = option(0.0, "PPO-ptx: weight of a loss on pretraining text", low=0)
    discount: float = option(1.0, "γ: what a reward one token later counts", low=0, high=1)
    gae_lambda: float = option(0.95, "λ of generalised advantage estimation", low=0, high=1)
    policy_clip: float = option(0.2, "the probability ratio is clipped to 1 ± this", low=0)
    value_clip: float = option(0.2, "new values are clipped to the old ones ± this", low=0)
    temperature: float = option(1.0, "of the rollouts, and of every log-probability", low=0.01)
    missing_end_penalty: float = option(1.0, "score lost by a response that does not end", low=0)
    save_every: int = option(10, "iterations between checkpoints", low=1)

    def check(self):
        if self.batch_size % self.minibatch_size:
            return f"minibatch_size={self.minibatch_size} must divide batch_size={self.batch_size}"

# --------------------------------------------------------------------------------------------------
# The mathematics. Tensors are (B, T): what stands at position t belongs to the token predicted
# there, token t+1. `mask` is True where that token is in the response; the rest is ignored.

def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()

def whiten(x, mask):
    """Shift to mean 0 and scale to variance 1 over the mask; outside it 0 comes out. 1e-8 is added
    to the variance, as all x may be equal."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coefficient):
    """r_t = -β (log π - log π_ref) at every token, plus the score (B,) at the last one (Ziegler et
    al. 2019, eq. 2); 0 outside the mask. A response has one token at least."""
    rewards = -kl_coefficient * (logprobs - ref_logprobs) * mask
    last = mask.cumsum(1).argmax(1, keepdim=True)  # where the count of tokens reaches its maximum
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))

def gae(rewards, values, mask, discount=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16):

        A_t = Σ_l (γλ)^l δ_{t+l},    δ_t = r_t + γ V_{t+1} - V_t,    V = 0 past the end

    λ = 1: A_t is all the reward that followed, minus V_t, which is noisy; λ = 0: only δ_t, which
    trusts V_{t+1}. values[t] is V of the state *before* the token that is predicted at t. Gives
    (advantages, returns): the returns, advantages + values, are what V learns. Both are 0 outside
    the mask; what stands there in rewards and values must not matter."""
    values = values * mask
    next_values = F.pad(values[:, 1:], (0, 1))
    delta = rewards + discount * next_values - values
    advantages, following = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        following = (delta[:, t] + discount * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask

def policy_loss(logprobs, old_logprobs, advantages, clip):
    """max(-Aρ, -A clip(ρ, 1 ± ε)), ρ = π/π_old, for each token (Schulman et al. 2017, eq. 7). At
    ρ = 1 the gradient is that of -A log π; it is 0 once ρ is more than ε beyond 1 in the direction
    that A wants."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))

def value_loss(values, old_values, returns, clip):
    """½ max((V - R)², (clip(V, V_old ± ε) - R)²), for each token."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)

def kl_estimates(logprobs, ref_logprobs):
    """Two estimates of KL(π‖π_ref) from samples of π, for each token (Schulman 2020): k1 =
    log π/π_ref, and k3 = e^-k1 - 1 + k1, which is never negative. Both have the right mean."""
    k1 = logprobs - ref_logprobs
    return k1, torch.exp(-k1) - 1 + k1

# --------------------------------------------------------------------------------------------------
# Rollout and update

def score_rollout(run, config, models, prompts, responses, end):
    """What the update needs to know of each response, as a dict of tensors, the same on every
    process: tokens and targets (B, T) as `join` makes them, lengths (B,), old and reference
    log-probabilities and values (B, T), scores (B,), and whether the response ended (B,)."""
    policy, reference, value_model, reward_model = models
    tokens, targets, lengths = join(prompts, responses, run.device)
    results = []
    mine = run.share(len(tokens))
    for start in range(mine.start, mine.stop, config.micro_batch_size):
        rows = slice(start, min(start + config.micro_batch_size, mine.stop))
        with run.evaluating(policy), run.evaluating(value_model):
            old = -policy(tokens[rows], targets[rows], config.temperature)  # log p = minus the loss
            ref = -reference(tokens[rows], targets[rows], config.temperature)
            values = value_model(tokens[rows])                                         # (b, T)
            scores = reward_model(tokens[rows], lengths[rows])                         # (b,)
        results += zip(old.cpu(), ref.cpu(), values.cpu(), scores.cpu())  # a tuple for each row
    old, ref, values, scores = (torch.stack(c).to(run.device) for c in zip(*run.gather(results)))
    ended = torch.tensor([end in response for response in responses], device=run.device)
    return dict(tokens=tokens, targets=targets, lengths=lengths, old=old, ref=ref, values=values,
                scores=scores, ended=ended)

def update(run, config, models, optimizers, rollout, step, text=None):
    """Update the policy and the value function on one rollout; returns the figures to log.

    models: policy and value function, as run.wrap gives them; text: tokens of pretraining, for
    PPO-ptx."""
    policy, value_model = models
    tokens, targets, lengths = rollout["tokens"], rollout["targets"], rollout["lengths"]
    old, old_values = rollout["old"], rollout["values"]
    mask = targets != IGNORE                                                           # (B, T)
    scores = rollout["scores"] - config.missing_end_penalty * ~rollout["ended"]
    rewards = token_rewards(scores, old, rollout["ref"], mask, config.kl_coefficient)
    advantages, returns = gae(rewards, old_values, mask, config.discount, config.gae_lambda)
    advantages = whiten(advantages, mask)  # so that a step does not depend on the scale of scores

    factor = learning_rate_factor(step, config.max_steps, config.warmup_steps)
    rng = random_stream(config.seed, "minibatches", step)
    n, totals, minibatches, too_far = len(tokens), torch.zeros(4, device=run.device), 0, False
    for epoch in range(config.epochs):
        order = rng.permutation(n)
        for start in range(0, n, config.minibatch_size):
            chosen = torch.from_numpy(order[start:start + config.minibatch_size]).to(run.device)
            chosen = chosen[lengths[chosen].argsort(stable=True)]  # like beside like: less padding
            n_tokens = mask[chosen].sum()  # of the whole minibatch, whoever computes its rows
            if config.ptx_coefficient:
                windows = draw_windows(text, rng, len(chosen), policy).to(run.device)
            figures = torch.zeros(4, device=run.device)
            for rows in run.micro_batches(len(chosen), policy, value_model):
                i = chosen[rows]
                T = -(-int(lengths[i].max()) // 8) * 8  # columns that hold more than padding
                x, y, m, A, R = (z[i, :T] for z in (tokens, targets, mask, advantages, returns))
                with run.autocast():
                    logprobs = -policy(x, y, config.temperature)                       # (b, T)
                    values = value_model(x)                                            # (b, T)
                pi_loss = policy_loss(logprobs, old[i, :T], A, config.policy_clip)
                v_loss = value_loss(values, old_values[i, :T], R, config.value_clip)
                pi_loss, v_loss = (pi_loss * m).sum() / n_tokens, (v_loss * m).sum() / n_tokens
                ((pi_loss + v_loss) * run.world).backward()  # they share no weights
                if config.ptx_coefficient:  # InstructGPT, eq. 2: keep reading, so as not to forget
                    w = windows[rows]
                    with run.autocast():
                        ptx = policy(w[:, :-1], w[:, 1:], dense=True).sum() / windows[:, 1:].numel()
                    (config.ptx_coefficient * ptx * run.world).backward()
                with torch.no_grad():  # how many ρ are beyond 1 ± ε; KL(π_old‖π): π_old has sampled
                    clipped = ((logprobs - old[i, :T]).exp() - 1).abs() > config.policy_clip
                    distance = kl_estimates(old[i, :T], logprobs)[1]
                    figures += torch.stack([pi_loss, v_loss, (clipped * m).sum() / n_tokens,
                                            (distance * m).sum() / n_tokens])
            figures = run.sum(figures)
            too_far = config.kl_stop and figures[3] > config.kl_stop
            if too_far:  # before the step, not after it: its gradient is thrown away
                break
            for model, optimizer in zip((policy, value_model), optimizers):
                clip_gradients(model, config.gradient_clip, step)
                optimizer.step(factor)
            totals, minibatches = totals + figures, minibatches + 1
        if too_far:
            policy.zero_grad()
            value_model.zero_grad()
            break
    names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
    return dict(zip(names, (totals / max(1, minibatches)).tolist()), minibatches=minibatches,
                **describe(rollout, mask, returns))

def describe(rollout, mask, returns):
    """The figures of a rollout, as a dict of Python's numbers. Means over responses: reward (the
    scores), kl (k1, summed over a response's tokens), length (in tokens), ended (the share that
    did). Means over all tokens: kl3_per_token (k3), entropy (estimated by -log π_old), and
    explained_variance, 1 - mean (R - V)² / variance of R: 1 for a V that foretells all returns, 0
    for one that knows their mean only. (That variance counts as 1e-8 at least.)"""
    k1, k3 = kl_estimates(rollout["old"], rollout["ref"])
    unexplained = masked_mean((returns - rollout["values"]) ** 2, mask)
    variance = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask).clamp(min=1e-8)
    figures = dict(reward=rollout["scores"].mean(), kl=(k1 * mask).sum(1).mean(),
                   kl3_per_token=masked_mean(k3, mask), entropy=-masked_mean(rollout["old"], mask),
                   explained_variance=1 - unexplained / variance,
                   length=mask.sum(1).float().mean(), ended=rollout["ended"].float().mean())
    return {name: figure.item() for name, figure in figures.items()}

def draw_windows(text, rng, n, policy):
    """n windows of pretraining text, (n, 65) tokens, or less where the context is shorter."""
    length = min(64, getattr(policy, "module", policy).model.config.block_size)  # DDP's .module
    starts = rng.integers(len(text) - length, size=n)
    return torch.from_numpy(np.stack([text[i:i + length + 1] for i in starts]).astype(np.int64))

def load_models(run, config, tokenizer):
    """(policy, reference, value function, reward model): two copies of sft.pt, two of reward.pt."""
    sft = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
    name = f"reward-{config.reward}" if config.reward else "reward"
    reward = load_checkpoint(run.path(f"{name}.pt"), "python reward.py", tokenizer.hash)
    policy, reference = (restore(LanguageModel, sft, run.device) for _ in range(2))
    value_model, reward_model = (restore(ScalarModel, reward, run.device) for _ in range(2))
    return policy, reference.eval(), value_model, reward_model.eval()

def main():
    config = load_config(PPOConfig, __doc__)
    tokenizer = load_tokenizer(config.out_dir)
    run = Run(config)
    policy, reference, value_model, reward_model = models = load_models(run, config, tokenizer)
    # Prompts that the reward model has not seen; a prompt may be drawn again.
    records = read_prompts(run, tokenizer, policy.model.config.block_size, "ppo")
    text = load_tokens(config.out_dir, "train")[0] if config.ptx_coefficient else None
    # Adam's ε is 1e-5, as in OpenAI's code: towards the end gradients vanish, and with a smaller ε
    # the noise that is left would be blown up.
    rates = (policy, config.learning_rate), (value_model, config.value_learning_rate)
    optimizers = [Optimizer(model, rate, config.muon_learning_rate, config.weight_decay,
                            (0.9, 0.999), eps=1e-5, dtype=run.dtype) for model, rate in rates]
    parts = dict(optimizer=optimizers[0], value_model=value_model, value_optimizer=optimizers[1])
    checkpoint = run.start(tokenizer.hash, model=policy, **parts)
    step, figures = checkpoint.get("step", 0), checkpoint.get("figures", {})
    ddp_models = run.wrap(policy), run.wrap(value_model)
    origin = dict(tokenizer=tokenizer.hash, parent="sft.pt")

    while step < config.max_steps:
        rng = random_stream(config.seed, "ppo prompts", step)
        batch = [records[i] for i in rng.choice(len(records), config.batch_size)]
        responses = respond(policy, tokenizer, batch, run, ("rollout", step), config.temperature)
        prompts = [prompt_ids(tokenizer, record["prompt"]) for record in batch]
        rollout = score_rollout(run, config, models, prompts, responses, tokenizer.end)
        figures = update(run, config, ddp_models, optimizers, rollout, step, text)
        gold = [rubric_score(record, tokenizer.text(ids), tokenizer.end in ids)
                for record, ids in zip(batch, responses) if "rubric" in record]
        figures["gold"] = float(np.mean(gold)) if gold else None
        step += 1
        run.log(step, f"step {step:3}/{config.max_steps}  reward {figures['reward']:6.3f}  gold "
                f"{np.mean(gold) if gold else np.nan:6.3f}  KL {figures['kl']:5.2f}  entropy "
                f"{figures['entropy']:.2f}  clipped {figures['clip_fraction']:.1%}  explained "
                f"{figures['explained_variance']:5.2f}  length {figures['length']:.0f}  ended "
                f"{figures['ended']:.0%}", **figures)
        due = step % config.save_every == 0 or step == config.max_steps
        states = {name: part.state_dict() for name, part in parts.items()}
        run.save_last(due, policy, step, figures=figures, **states, **origin)

    run.save(f"{run.stage}.pt", policy, step, **origin)
    scorecard(run, policy, tokenizer, kl=figures.get("kl"), reward=figures.get("reward"))

if __name__ == "__main__":
    main()
