"""Proofs of the RLHF part that do not trust its own code: exact gradients by enumeration, a known optimum, brute force.

Language models over so few words that every response can be written down: then the objective of PPO, its gradient, its
optimum and the distance to it are sums that are taken exactly. Broken on purpose, ppo.py ends far from all of them."""

import itertools
import math

import numpy as np
import pytest
import torch

import ppo
import sample
from helpers import Recorder, close, float64, ppo_run, tiny
from model import LanguageModel, ModelConfig, Optimizers, ScalarModel, learning_rate_factor
from prepare import prompt_ids

END, START, V = 0, 3, 4  # the end is also what batches are padded with, which must not matter


class Words:
    """A tokenizer of four words, the end and the start among them, which knows digits only."""
    end, start, size = END, START, V

    def encode(self, text):
        return [int(c) for c in text if c.isdigit()]


RECORDS = [dict(prompt="1"), dict(prompt="21")]
PROMPTS = [prompt_ids(Words(), r["prompt"]) for r in RECORDS]              # of 4 and 5 tokens


# Every response of at most two words, the end alone or a word and then any, to both prompts.
EVERYTHING = [(p, y) for p in PROMPTS for y in [[END]] + [[a, b] for a in range(1, V) for b in range(V)]]     # 26


def log_probabilities(model, temperature=1.0):
    """log π(response | prompt) of EVERYTHING from bare logits, one sequence at a time: no batch, mask or index."""
    total = []
    for prompt, response in EVERYTHING:
        log_p = (model(torch.tensor([prompt + response]))[0] / temperature).log_softmax(-1)
        total.append(sum(log_p[len(prompt) - 1 + t, token] for t, token in enumerate(response)))
    return torch.stack(total)


def flat_gradient(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


@pytest.fixture
def double():
    with float64():
        yield


def small(cls, seed, **shape):
    return tiny(cls, seed, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, vocab_size=V, **shape)


# ---------------------------------------------------------------------------------------------------------------------
# The gradient

@pytest.mark.parametrize("micro_batch_size, threads", [(64, 1), (5, 1), (5, 3)])
def test_gradient_of_an_update_is_exact(double, monkeypatch, micro_batch_size, threads):
    """ppo_step's gradient over every response, each weighted by π(y), is J's, J = Σ π(y) [r(y) - β log π(y)/π_ref(y)],
    to 1e-9 in all parameters of a Transformer, and the value function's is that of ½ (V - R)².

    Catches k3 in the reward, a KL that is clamped, averaged or missing at the last token, a score that is read or added
    at the wrong token, V shifted by one, a temperature forgotten in one place, an end token taken for padding."""
    run, config = ppo_run(threads, micro_batch_size=micro_batch_size, gae_lambda=1.0, temperature=0.8,
                          missing_end_penalty=0.7, gradient_clip=1e9)
    policy, reference, value, judge = (small(c, i) for i, c in enumerate([LanguageModel] * 2 + [ScalarModel] * 2))
    rows = ppo.score_rollout(run, config, Words(), (policy, reference, value, judge), *zip(*EVERYTHING))

    log_pi = log_probabilities(policy, 0.8)
    pi, log_ratio = log_pi.exp(), log_pi - log_probabilities(reference, 0.8).detach()
    assert pi.sum().item() == pytest.approx(len(PROMPTS), abs=1e-12)            # it is everything
    r = torch.stack([judge(torch.tensor([p + y]))[0, -1] - 0.7 * (END not in y) for p, y in EVERYTHING]).detach()
    J = (pi * (r - 0.3 * log_ratio)).sum()

    recorders = Recorder(policy), Recorder(value)
    with monkeypatch.context() as patch:  # whitening makes way for the weights π(y), and the mean for a sum
        patch.setattr(ppo, "whiten", lambda A, mask: A * pi.detach()[:, None] * mask.sum())
        ppo.ppo_step(run, config, (policy, value), recorders, rows, 0, 1.0, np.random.default_rng(0), 0.3)
    expected = flat_gradient(J, policy)
    assert expected.abs().max() > 0.05
    close(-recorders[0].seen[0], expected)                                      # ppo_step minimises -J

    losses = []
    for (prompt, response), row, score in zip(EVERYTHING, rows, r.tolist()):
        v = value(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]     # V before each token
        kl = [o - f for o, f in zip(row["old"], row["ref"])]
        losses += [0.5 * (v[t] - (score - 0.3 * sum(kl[t:]))) ** 2 for t in range(len(response))]
    close(recorders[1].seen[0], flat_gradient(torch.stack(losses).mean(), value))


def test_whitening_leaves_the_direction_exact(double):
    """With advantages whitened, and each word drawn as often as π says, the gradient is still J's, over the standard
    deviation of r: what whitening subtracts is no part of it (catches means over padding)."""
    run, config = ppo_run(gae_lambda=1.0, gradient_clip=1e9)
    policy, value = small(LanguageModel, 0, tie_embeddings=False), small(ScalarModel, 1)
    policy.lm_head.weight.data.zero_()                                          # π = 1/4 for each of four words
    r = torch.tensor([0.3, -1.0, 0.5, 2.0])
    rows = [dict(prompt=PROMPTS[0], response=[a], score=r[a].item(), ended=True, old=[-math.log(V)], ref=[0.0],
                 values=[0.0]) for a in range(V)]
    recorders = Recorder(policy), Recorder(value)
    ppo.ppo_step(run, config, (policy, value), recorders, rows, 0, 1.0, np.random.default_rng(0), 0.0)
    pi = policy(torch.tensor(PROMPTS[:1]))[0, -1].softmax(-1)
    expected = flat_gradient((pi * r).sum() / r.std(correction=0), policy)
    assert expected.abs().max() > 0.05
    close(-recorders[0].seen[0], expected, 1e-7)                                # 1e-8 stands in the square root


def test_pretraining_gradient_is_added(double):
    """PPO-ptx: the policy's gradient is PPO's plus γ times that of the mean next-token loss on windows of pretraining
    text, whatever the micro-batch (Ouyang et al. 2022, eq. 2); the value function's stays what it is."""
    text, starts = np.arange(3000) ** 2 % 7 % V, [5, 0, 2935, 17, 18, 2000, 900]

    class Draws:
        """Random numbers that say which windows are drawn."""
        permutation = np.arange

        def integers(self, high, size):
            assert (high, size) == (2936, 7)
            return starts

    def update(**changes):
        run, config = ppo_run(gradient_clip=1e9, minibatch_size=7, **changes)
        policy, value = small(LanguageModel, 0, block_size=80), small(ScalarModel, 1)
        rows = [dict(prompt=p, response=y, score=math.sin(i), ended=END in y, old=[-1.5] * len(y), ref=[-1.0] * len(y),
                     values=[0.1 * i] * len(y)) for i, (p, y) in enumerate(EVERYTHING[:7])]
        recorders = Recorder(policy), Recorder(value)
        ppo.ppo_step(run, config, (policy, value), recorders, rows, 0, 1.0, Draws(), 0.1, text)
        return policy, recorders[0].seen[0], recorders[1].seen[0]

    _, plain, plain_value = update()
    w = torch.from_numpy(np.stack([text[i:i + 65] for i in starts]))
    for micro_batch_size in (64, 2):
        policy, found, found_value = update(ptx_coefficient=27.8, micro_batch_size=micro_batch_size)
        mean_loss = -policy(w[:, :-1]).log_softmax(-1).gather(2, w[:, 1:, None]).mean()
        close(found, plain + 27.8 * flat_gradient(mean_loss, policy))
        close(found_value, plain_value)
        assert (found - plain).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------------
# The rollout

def test_rollouts_follow_the_policy():
    """Responses come as often as the policy says, word for word at the temperature of the log-probabilities, and others
    at every step (catches greedy rollouts by accident, sampling with another temperature or top-k)."""
    n = 6000
    run, config = ppo_run(max_new_tokens=2, temperature=0.8)
    policy = small(LanguageModel, 0)
    records = [r for r in RECORDS for _ in range(n)]
    prompts, responses = ppo.rollout(run, config, Words(), policy, records, 3)
    assert prompts == [p for p in PROMPTS for _ in range(n)]
    with torch.no_grad():
        for (p, y), log_p in zip(EVERYTHING, log_probabilities(policy, 0.8)):
            share, probability = sum(x == (p, y) for x in zip(prompts, responses)) / n, log_p.exp().item()
            assert share == pytest.approx(probability, abs=4 * (probability / n) ** 0.5), (p, y)
    assert ppo.rollout(run, config, Words(), policy, records[:50], 4)[1] != responses[:50]


# ---------------------------------------------------------------------------------------------------------------------
# The optimum

class RewardTable:
    """In place of a reward model: r of every whole sequence, and nothing that could be read at any other token."""

    def __init__(self, rewards):
        self.rewards = {tuple(p + y): r for (p, y), r in zip(EVERYTHING, rewards.tolist())}

    def __call__(self, tokens, lengths):
        return torch.tensor([self.rewards[tuple(row[:n])] for row, n in zip(tokens.tolist(), lengths.tolist())])


def train_to_the_optimum(seed, beta=0.5, steps=70, rate=3e-3):
    """PPO as ppo.py does it, on rewards drawn from N(0, 1): (KL(π‖π*) before, after, the last figures, J*)."""
    torch.manual_seed(seed)
    config = ModelConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=8, vocab_size=V)
    policy, reference, value = LanguageModel(config), LanguageModel(config), ScalarModel(config)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(2 if p.dim() == 2 else 1)                                    # π_ref is not uniform
    reference.load_state_dict(policy.state_dict())
    rewards = torch.randn(len(EVERYTHING))
    run, config = ppo_run(seed=seed, minibatch_size=128, micro_batch_size=256, epochs=1, max_new_tokens=2,
                          missing_end_penalty=0.0, max_steps=steps)
    optimizers = [Optimizers(m, rate, betas=(0.9, 0.999), eps=1e-5) for m in (policy, value)]
    models, records = (policy, reference, value, RewardTable(rewards)), RECORDS * 256

    @torch.no_grad()
    def distance():
        """KL(π‖π*), π* ∝ π_ref exp(r/β), a mean over the prompts; and J* = β log Z."""
        log_pi, log_ref = (log_probabilities(m).double().view(2, -1) for m in (policy, reference))
        r = rewards.double().view(2, -1)
        log_z = (log_ref + r / beta).logsumexp(1, keepdim=True)
        kl = (log_pi.exp() * (log_pi - (log_ref + r / beta - log_z))).sum(1)
        J = (log_pi.exp() * (r - beta * (log_pi - log_ref))).sum(1)
        close(beta * log_z.squeeze(1) - J, beta * kl, 1e-5)                     # an identity: J* - J = β KL(π‖π*)
        return kl.mean().item(), beta * log_z.mean().item()

    before, _ = distance()
    for step in range(steps):
        answered = ppo.rollout(run, config, Words(), policy, records, step)
        rows = ppo.score_rollout(run, config, Words(), models, *answered)
        figures = ppo.ppo_step(run, config, (policy, value), optimizers, rows, step, learning_rate_factor(step, steps),
                               np.random.default_rng((seed, step)), beta)
    after, best = distance()
    return before, after, figures, best


def test_ppo_finds_the_known_optimum():
    """A Transformer trained by ppo.py's rollouts, scores and updates ends at π* ∝ π_ref exp(r/β), for three drawings of
    the rewards, and the logged reward - β KL is J* = β log Z, of which there is no better.

    Catches what changes the fixed point: k3 or no KL in the reward, none at the last token, V shifted by one, a
    reference that is the policy itself, greedy rollouts, no exploration."""
    ends = []
    for seed in range(3):
        before, after, figures, best = train_to_the_optimum(seed)
        assert before > 1
        ends.append((after, abs(figures["reward"] - 0.5 * figures["kl"] - best)))
    assert np.median([after for after, _ in ends]) < 0.01, ends
    assert np.median([gap for _, gap in ends]) < 0.02, ends                     # there, every response is worth J*


# ---------------------------------------------------------------------------------------------------------------------
# Early stopping

def test_early_stop_takes_no_step():
    """Once the policy is too far from the rollout, an update ends *before* stepping: bit for bit the weights and the
    optimizers of an update that had only the minibatches before, the value function's too, and no gradient is left.

    Catches a stop that multiplies the loss by 0: Adam's momentum would move the weights all the same."""
    def update(**changes):
        run, config = ppo_run(**changes)
        policy, value = small(LanguageModel, 0), small(ScalarModel, 1)
        models = (policy, small(LanguageModel, 2), value, small(ScalarModel, 3))
        rows = ppo.score_rollout(run, config, Words(), models, *zip(*EVERYTHING))
        optimizers = [Optimizers(m, 1e-2, betas=(0.9, 0.999), eps=1e-5) for m in (policy, value)]
        figures = ppo.ppo_step(run, config, (policy, value), optimizers, rows, 0, 1.0, np.random.default_rng(0), 0.1)
        assert all(p.grad is None for m in (policy, value) for p in m.parameters())
        weights = [p.detach() for m in (policy, value) for p in m.parameters()]
        moments = [v for o in optimizers for a in o.all for state in a.state.values() for v in state.values()]
        return figures["minibatches"], weights + moments

    (n, once), (n_stopped, stopped), (n_through, through) = (
        update(), update(epochs=4, kl_stop=1e-6), update(epochs=4, kl_stop=1e9))
    assert (n, n_stopped, n_through) == (1, 1, 4)
    assert len(stopped) == len(once) and all(map(torch.equal, stopped, once))
    assert not any(map(torch.equal, stopped, through))


# ---------------------------------------------------------------------------------------------------------------------
# Best of n, and the curves of over-optimisation

@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    """The unbiased estimate of best-of-n is the mean over all subsets of n of N samples of the value of the one that
    the proxy likes best (catches means over the n best, and an order by value instead of by proxy)."""
    proxy, values = np.random.default_rng(0).normal(size=(2, 3, 6))
    brute = np.mean([[values[row, max(subset, key=lambda i: proxy[row, i])]
                      for subset in itertools.combinations(range(6), n)] for row in range(3)])
    assert sample.best_of_n_means(proxy, values, n) == pytest.approx(brute, abs=1e-12)


@pytest.mark.parametrize("kind, bend", [("best-of-n", lambda d: d * d), ("PPO", lambda d: d * np.log(d))])
def test_fit_finds_the_coefficients_again(kind, bend):
    """From noiseless curves of Gao et al.'s forms, gold(0) + d (α - β d) and gold(0) + d (α - β log d), the fit finds
    the coefficients exactly; and not with the other form."""
    d = np.linspace(0.1, 4, 12)
    gold = 0.3 + 1.7 * d - 0.45 * bend(d)
    coefficients, fitted = sample.fit_gold(d, gold, kind)
    np.testing.assert_allclose(coefficients, (0.3, 1.7, 0.45), atol=1e-9)
    np.testing.assert_allclose(fitted, gold, atol=1e-9)
    other, _ = sample.fit_gold(d, gold, "PPO" if kind == "best-of-n" else "best-of-n")
    assert abs(other - (0.3, 1.7, 0.45)).max() > 0.05
    assert np.isfinite(sample.fit_gold(np.append(0.0, d), np.append(0.3, gold), kind)[0]).all()     # d = 0 is allowed
