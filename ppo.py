"""Stage 4, RLHF: proximal policy optimisation tunes the SFT model to earn the reward model's score.

    maximise  E[ r(prompt, response) - β · log(π(response) / π_SFT(response)) ]

Each iteration samples responses to new prompts (the rollout), scores them, estimates how much better each token was
than expected (the advantage), and makes better tokens likelier, within a clipped distance of the sampling policy
(Schulman et al. 2017; Ouyang et al. 2022, step 3; implementation details as in Huang et al. 2024, "N+").

Four models: the policy π and the value function V are trained; the SFT model (reference) and the reward model are not.

    python ppo.py                                torchrun --nproc_per_node=8 ppo.py --config=…

It reads sft.pt, reward.pt and prompts.jsonl and writes ppo.pt and ppo.last.pt (for --resume).
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from model import (IGNORE, LanguageModel, Optimizers, Run, TrainConfig, learning_rate_factor,
                   load_checkpoint, load_config, load_reward_model, option, pad, restore)
from prepare import load_tokenizer, load_tokens, prompt_ids, read_prompts, respond, rubric_score, scorecard


@dataclass
class PPOConfig(TrainConfig):
    table = "ppo"
    variant: str = option("", "a name for this policy, ppo-NAME.pt, beside others in the run folder")
    reward: str = option("", "the variant of the reward model to please, reward-NAME.pt")
    max_steps: int = option(40, "iterations: rollout, then update", low=1)
    batch_size: int = option(96, "prompts an iteration, over all processes", low=1)
    minibatch_size: int = option(24, "responses an optimizer step", low=1)
    micro_batch_size: int = option(64, "responses a process computes at once", low=1)
    epochs: int = option(2, "passes over each rollout", low=1)
    learning_rate: float = option(3e-4, "peak rate of the policy, annealed to 0", low=0)
    value_learning_rate: float = option(1e-3, "peak rate of the value function, annealed to 0", low=0)
    warmup_steps: int = option(0, "iterations of linear warm-up", low=0)
    kl_coefficient: float = option(0.1, "β: reward lost per nat of log π/π_SFT", low=0)
    kl_target: float = option(0.0, "adapt β so that KL comes to this, in nats a response; 0: β stays", low=0)
    kl_horizon: float = option(10000.0, "with kl_target: responses over which β adapts", low=1)
    kl_stop: float = option(0.0, "end an update at this distance from the sampling policy, in nats a token; 0: never",
                            low=0)
    whiten_rewards: bool = option(False, "scale the rewards of each rollout to variance 1")
    ptx_coefficient: float = option(0.0, "γ of PPO-ptx: weight of pretraining's loss in the policy's", low=0)
    discount: float = option(1.0, "γ", low=0, high=1)
    gae_lambda: float = option(0.95, "λ of generalised advantage estimation", low=0, high=1)
    policy_clip: float = option(0.2, "the probability ratio is clipped to 1 ± this", low=0)
    value_clip: float = option(0.2, "new values are clipped to old ± this", low=0)
    temperature: float = option(1.0, "of the rollouts, and of every log-probability", low=0.01)
    missing_end_penalty: float = option(1.0, "score lost by a response that does not end", low=0)
    save_every: int = option(10, "iterations between checkpoints", low=1)


# ---------------------------------------------------------------------------------------------------------------------
# The mathematics. All tensors are (B, R): response tokens from the left, then padding, which `mask` marks with False.

def masked_mean(x, mask):
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """Scale to variance 1 over the entries of the mask, and shift to mean 0; without shift_mean the mean stays."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean) * mask


def token_rewards(scores, logprobs, ref_logprobs, mask, kl_coefficient):
    """r_t = -β (log π - log π_ref) at every token, plus the score at the last (Ziegler et al. 2019, eq. 2)."""
    rewards = -kl_coefficient * (logprobs - ref_logprobs) * mask
    last = mask.sum(1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores[:, None].to(rewards.dtype))


def gae(rewards, values, mask, discount=1.0, lam=0.95):
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16): A_t = Σ_l (γλ)^l δ_{t+l},
    δ_t = r_t + γ V_{t+1} - V_t, where V is 0 past the end. values[t] is V of the state *before* token t.

    Returns (advantages, returns), both (B, R); returns = advantages + values is what V learns."""
    values = values * mask
    delta = rewards + discount * F.pad(values[:, 1:], (0, 1)) - values
    advantages, following = torch.zeros_like(rewards), 0.0
    for t in reversed(range(rewards.shape[1])):
        following = (delta[:, t] + discount * lam * following) * mask[:, t]
        advantages[:, t] = following
    return advantages, (advantages + values) * mask


def policy_loss(logprobs, old_logprobs, advantages, clip):
    """max(-A ρ, -A clip(ρ, 1 ± ε)) with ρ = π/π_old, for each token (Schulman et al. 2017, eq. 7)."""
    ratio = (logprobs - old_logprobs).exp()
    return torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def value_loss(values, old_values, returns, clip):
    """½ max((v - R)², (clip(v, v_old ± ε) - R)²), for each token."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


def kl_estimates(logprobs, ref_logprobs):
    """Estimates of KL(π‖π_ref) from samples of π (Schulman 2020): k1 = log π/π_ref; k3 = e^-k1 - 1 + k1, never
    negative. Both have the right mean, for each token."""
    k1 = logprobs - ref_logprobs
    return k1, torch.exp(-k1) - 1 + k1


def adapted_kl_coefficient(beta, kl, target, n, horizon):
    """β after n responses whose KL was `kl`: raised when that is above the target, lowered when below, by at most a
    fifth of n / horizon (Ziegler et al. 2019, 2.2)."""
    return beta * (1 + max(-0.2, min(0.2, kl / target - 1)) * n / horizon)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts

def make_batch(prompts, responses, device):
    """Lists of ids → tokens (B, T) of prompt + response, targets (B, T): the next token where it is the response's,
    else IGNORE; starts (B,): the position that predicts the response's first token; lengths (B,) of the responses."""
    tokens = pad([p + r for p, r in zip(prompts, responses)]).to(device)
    targets = pad([[IGNORE] * (len(p) - 1) + r + [IGNORE] for p, r in zip(prompts, responses)], IGNORE).to(device)
    starts = torch.tensor([len(p) - 1 for p in prompts], device=device)
    lengths = torch.tensor([len(r) for r in responses], device=device)
    return tokens, targets, starts, lengths


def at_response(x, starts, lengths):
    """(B, T) by position → (B, R) by response token, 0 where a response has fewer."""
    t = torch.arange(int(lengths.max()), device=x.device)
    return x.gather(1, (starts[:, None] + t).clamp(max=x.shape[1] - 1)) * (t < lengths[:, None])


def response_logprobs(model, batch, temperature):
    """log π of each response token, (B, R); the vocabulary head is computed at these positions only."""
    tokens, targets, starts, lengths = batch
    return -at_response(model(tokens, targets, temperature), starts, lengths)


def response_values(model, batch):
    """V of the state before each response token, (B, R)."""
    tokens, _, starts, lengths = batch
    return at_response(model(tokens), starts, lengths)


def last_token_scores(model, batch):
    """The reward model's score of each whole sequence, (B,)."""
    tokens, _, starts, lengths = batch
    return model(tokens, starts + lengths + 1)


def rollout(run, config, tokenizer, policy, records, step):
    """The prompts and responses of an iteration, as lists of ids."""
    return ([prompt_ids(tokenizer, record["prompt"]) for record in records],
            respond(policy, tokenizer, records, run, (5, step), config.temperature))


def score_rollout(run, config, tokenizer, models, prompts, responses):
    """What the update needs to know of each response, as a list of dicts of plain numbers."""
    policy, reference, value_model, reward_model = models

    def score(part):
        some, rows = [responses[i] for i in part], []
        batch = make_batch([prompts[i] for i in part], some, run.device)
        old, ref = (response_logprobs(m, batch, config.temperature) for m in (policy, reference))
        values, scores = response_values(value_model, batch), last_token_scores(reward_model, batch)
        for i, response, *columns in zip(part, some, scores, old, ref, values):
            r, *columns = (x[:len(response)].tolist() if x.dim() else x.item() for x in columns)
            rows.append(dict(zip(("old", "ref", "values"), columns), prompt=prompts[i], response=response, score=r,
                             ended=tokenizer.end in response))
        return rows

    return run.evaluate(score, len(prompts), config.micro_batch_size)


def ppo_step(run, config, models, optimizers, rows, step, factor, rng, beta, text=None):
    """Update policy and value function on one rollout, the same on every process; returns the figures to log.

    rows: what score_rollout made of all responses; beta: the KL coefficient; text: tokens for PPO-ptx."""
    policy, value_model = models
    column = {k: pad([r[k] for r in rows]).to(run.device) for k in ("old", "ref", "values")}     # (B, R)
    mask = torch.arange(column["old"].shape[1], device=run.device) < torch.tensor(
        [len(r["response"]) for r in rows], device=run.device)[:, None]
    scores = torch.tensor([r["score"] - config.missing_end_penalty * (not r["ended"]) for r in rows], device=run.device)
    rewards = token_rewards(scores, column["old"], column["ref"], mask, beta)
    rewards = whiten(rewards, mask, shift_mean=False) if config.whiten_rewards else rewards
    advantages, returns = gae(rewards, column["values"], mask, config.discount, config.gae_lambda)
    explained = 1 - masked_mean((returns - column["values"]) ** 2, mask) / masked_mean(
        (returns - masked_mean(returns, mask)) ** 2, mask).clamp(min=1e-8)
    advantages = whiten(advantages, mask)

    totals, done = dict(policy_loss=0.0, value_loss=0.0, clip_fraction=0.0, approx_kl=0.0), 0
    minibatches = [order[i:i + config.minibatch_size] for order in [rng.permutation(len(rows)) for _ in
                   range(config.epochs)] for i in range(0, len(rows), config.minibatch_size)]
    lengths = np.array([len(r["prompt"]) + len(r["response"]) for r in rows])
    for chosen in minibatches:
        chosen = chosen[np.argsort(-lengths[chosen], kind="stable")]  # like lengths share a micro-batch: less padding
        n_tokens = mask[chosen].sum()  # of the whole minibatch, whoever computes its rows

        def prepare(part):
            index = torch.as_tensor(chosen[part], device=run.device)
            batch = make_batch([rows[i]["prompt"] for i in chosen[part]], [rows[i]["response"] for i in chosen[part]],
                               run.device)
            R = int(batch[3].max())
            return batch, [x[index, :R] for x in (mask, column["old"], advantages, column["values"], returns)]

        def policy_part(part):
            batch, (m, old, A, _, _) = prepare(part)
            logprobs = response_logprobs(policy, batch, config.temperature)
            clipped = ((logprobs - old).exp() - 1).abs() > config.policy_clip
            approx_kl = kl_estimates(old, logprobs)[1]
            columns = policy_loss(logprobs, old, A, config.policy_clip), clipped, approx_kl
            return torch.stack([(x * m).sum() for x in columns]) / n_tokens

        def value_part(part):
            batch, (m, _, _, old, R) = prepare(part)
            return (value_loss(response_values(value_model, batch), old, R, config.value_clip) * m).sum() / n_tokens

        pairs = [(policy, policy_part), (value_model, value_part)]
        if config.ptx_coefficient:  # InstructGPT's eq. 2: the policy keeps reading, so that it does not forget
            length = min(64, getattr(policy, "module", policy).model.config.block_size)
            starts = rng.integers(len(text) - length, size=len(chosen))
            windows = torch.tensor([text[i:i + length + 1].tolist() for i in starts], device=run.device)
            pairs.append((policy, lambda part: config.ptx_coefficient * policy(
                windows[part, :-1], windows[part, 1:]).sum() / windows[:, 1:].numel()))
        (loss, clip_fraction, approx_kl), v_loss, *_ = run.backward_all(len(chosen), config.micro_batch_size, *pairs)
        if config.kl_stop and approx_kl > config.kl_stop:  # before stepping, not by a loss of 0: Adam would still move
            policy.zero_grad()
            value_model.zero_grad()
            break
        run.update(policy, optimizers[0], loss, step, config, factor)
        run.update(value_model, optimizers[1], v_loss, step, config, factor)
        done += 1
        for name, figure in zip(totals, (loss, v_loss, clip_fraction, approx_kl)):
            totals[name] += figure
    totals = {name: total / max(1, done) for name, total in totals.items()}
    k1, k3 = kl_estimates(column["old"], column["ref"])
    return dict(reward=float(np.mean([r["score"] for r in rows])), kl=(k1 * mask).sum(1).mean().item(),
                kl3_per_token=masked_mean(k3, mask).item(), entropy=-masked_mean(column["old"], mask).item(),
                explained_variance=explained.item(), length=mask.sum(1).float().mean().item(),
                ended=float(np.mean([r["ended"] for r in rows])), kl_coefficient=beta, minibatches=done, **totals)


def main():
    config = load_config(PPOConfig, __doc__)
    with Run(config, "ppo") as run:
        tokenizer = load_tokenizer(config.out_dir)
        sft = load_checkpoint(run.path("sft.pt"), "python sft.py", tokenizer.hash)
        records = read_prompts(run, tokenizer, sft["model_config"].block_size, "ppo")  # not those that were ranked
        policy, reference = (restore(LanguageModel, sft, run.device) for _ in range(2))
        reward_model, value_model = (load_reward_model(run, tokenizer, config.reward) for _ in range(2))
        text = load_tokens(config.out_dir, "train")[0] if config.ptx_coefficient else None
        # Adam's ε of 1e-5 as in OpenAI's code: gradients vanish towards the end, and noise must not be blown up.
        optimizers = [Optimizers(model, rate, config.muon_learning_rate, config.weight_decay, (0.9, 0.999), 1e-5)
                      for model, rate in ((policy, config.learning_rate), (value_model, config.value_learning_rate))]
        checkpoint = run.start(tokenizer, "sft: sft.pt", model=policy, optimizer=optimizers[0],
                               value_model=value_model, value_optimizer=optimizers[1])
        step, beta, figures = checkpoint["step"], checkpoint.get("kl_coefficient", config.kl_coefficient), {}
        trained = run.wrap(policy), run.wrap(value_model)

        while step < config.max_steps:
            wanted = range(step * config.batch_size, (step + 1) * config.batch_size)
            shuffled = {e: np.random.default_rng((config.seed, 6, e)).permutation(len(records))
                        for e in {i // len(records) for i in wanted}}
            batch = [records[shuffled[i // len(records)][i % len(records)]] for i in wanted]
            prompts, responses = rollout(run, config, tokenizer, policy, batch, step)
            rows = score_rollout(run, config, tokenizer, (policy, reference, value_model, reward_model), prompts,
                                 responses)
            gold = [rubric_score(record, tokenizer.text(row["response"]), row["ended"])
                    for record, row in zip(batch, rows) if "rubric" in record]
            figures = ppo_step(run, config, trained, optimizers, rows, step,
                               learning_rate_factor(step, config.max_steps, config.warmup_steps),
                               np.random.default_rng((config.seed, 7, step)), beta, text)
            if config.kl_target:
                beta = adapted_kl_coefficient(beta, figures["kl"], config.kl_target, len(rows), config.kl_horizon)
            if gold:
                figures["gold"] = float(np.mean(gold))
            step += 1
            run.log(step, f"step {step:3}/{config.max_steps}  reward {figures['reward']:6.3f}  gold "
                    f"{figures.get('gold', np.nan):6.3f}  KL {figures['kl']:5.2f}  entropy {figures['entropy']:.2f}"
                    f"  clipped {figures['clip_fraction']:.1%}  explained {figures['explained_variance']:5.2f}  length "
                    f"{figures['length']:.0f}  ended {figures['ended']:.0%}", **figures)
            run.pause(step, config.max_steps, step % config.save_every == 0 or step == config.max_steps,
                      kl_coefficient=beta)

        run.save(f"{run.stage}.pt", step)
        scorecard(run, run.stage, policy, tokenizer,
                  **{name: round(figures[name], 3) for name in ("kl", "reward") if name in figures})
        if run.main:
            print("next: python sample.py --compare")


if __name__ == "__main__":
    main()
