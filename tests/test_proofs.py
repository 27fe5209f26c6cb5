"""Proofs of RLHF that do not trust its own code: exact gradients, a known optimum, brute force.

The language models here know so few words that every response can be written down. Then the
objective of PPO, its gradient, its optimum and the distance to it are sums that are taken exactly.
Broken on purpose, ppo.py ends far from all of them; which defects a test catches, its docstring
says.

    pytest tests/test_proofs.py              the known optimum with one drawing of the rewards
    pytest tests/test_proofs.py -m slow      the same with three
"""

import math

import numpy as np
import pytest
import torch
import torch.nn as nn

import ppo
from helpers import Recorder, close, exact_gradient, float64, ppo_run, tiny
from model import IGNORE, LanguageModel, ModelConfig, Optimizer, ScalarModel
from prepare import join, prompt_ids, respond

END, START, V = 0, 3, 4  # the end is also what batches are padded with, which must not matter


class Words:
    """A tokenizer of four words, the end and the start among them, which knows digits only."""
    end, start, size = END, START, V

    def encode(self, text):
        return [int(c) for c in text if c.isdigit()]


RECORDS = [dict(prompt="1"), dict(prompt="21")]
PROMPTS = [prompt_ids(Words(), record["prompt"]) for record in RECORDS]    # of 4 and of 5 tokens

# Every response of at most two words: the end alone, or a word and then any. 13 to each prompt.
RESPONSES = [[END]] + [[a, b] for a in range(1, V) for b in range(V)]
EVERYTHING = [(prompt, response) for prompt in PROMPTS for response in RESPONSES]


def log_probabilities(policy, temperature=1.0):
    """log π(response | prompt) of EVERYTHING, from bare logits and one sequence at a time: there is
    no batch, no mask and no index that could be wrong in the same way as the scripts'."""
    found = []
    for prompt, response in EVERYTHING:
        log_p = (policy(torch.tensor([prompt + response]))[0] / temperature).log_softmax(-1)
        at = len(prompt) - 1
        found.append(sum(log_p[at + t, token] for t, token in enumerate(response)))
    return torch.stack(found)


@pytest.fixture
def double():
    with float64():
        yield


def small(cls, seed, **shape):
    defaults = dict(n_layer=1, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, vocab_size=V)
    return tiny(cls, seed, **defaults | shape)


def four_models():
    """Policy, reference, value function and reward model, all different."""
    return (small(LanguageModel, 0), small(LanguageModel, 1), small(ScalarModel, 2),
            small(ScalarModel, 3))


def rollout_of(prompts, responses, scores, old, ref, values):
    """A rollout as score_rollout makes it, of numbers that are the same at each token of a row."""
    tokens, targets, lengths = join(prompts, responses, "cpu")
    everywhere = torch.ones(targets.shape) * (targets != IGNORE)
    old, ref, values, scores = (torch.tensor(x) for x in (old, ref, values, scores))
    return dict(tokens=tokens, targets=targets, lengths=lengths, scores=scores,
                old=old[:, None] * everywhere, ref=ref[:, None] * everywhere,
                values=values[:, None] * everywhere,
                ended=torch.tensor([END in response for response in responses]))


# --------------------------------------------------------------------------------------------------
# The gradient

@pytest.mark.parametrize("micro_batch_size", [64, 5, 1])
def test_gradient_of_an_update_is_exact(double, monkeypatch, micro_batch_size):
    """The gradient of ppo.update over every response, each weighted by π(y), is that of J = Σ π(y)
    [r(y) - β log π(y)/π_ref(y)] to 1e-9, in all parameters of a Transformer; the value function's
    is that of ½ (V - R)².

    Catches k3 in the reward (or with the ratio inverted), a KL that is clamped, averaged, or
    missing at the last token, a score that is read or added at the wrong token, V shifted by one, a
    temperature forgotten in one place, masks that are built and not used, an end token taken for
    padding, gradients clipped before the backward pass, means of micro-batches' means."""
    temperature, beta, penalty = 0.8, 0.3, 0.7
    run, config = ppo_run(micro_batch_size=micro_batch_size, gae_lambda=1.0, gradient_clip=1e9,
                          temperature=temperature, missing_end_penalty=penalty,
                          kl_coefficient=beta)
    policy, reference, value, judge = models = four_models()
    rollout = ppo.score_rollout(run, config, models, *zip(*EVERYTHING), END)

    log_pi = log_probabilities(policy, temperature)
    log_ref = log_probabilities(reference, temperature).detach()
    pi = log_pi.exp()
    assert pi.sum().item() == pytest.approx(len(PROMPTS), abs=1e-12)       # it is everything
    r = torch.stack([judge(torch.tensor([p + y]))[0, -1] - penalty * (END not in y)
                     for p, y in EVERYTHING]).detach()
    J = (pi * (r - beta * (log_pi - log_ref))).sum()
    expected = exact_gradient(J, policy)
    assert expected.abs().max() > 0.05

    recorders = Recorder(policy), Recorder(value)
    # Whitening makes way for the weights π(y), and the mean over tokens for a sum.
    monkeypatch.setattr(ppo, "whiten", lambda A, mask: A * pi.detach()[:, None] * mask.sum())
    ppo.update(run, config, (policy, value), recorders, rollout, 0)
    close(-recorders[0].seen[0], expected)                                 # update minimises -J

    losses = []
    for (prompt, response), old, ref, score in zip(EVERYTHING, rollout["old"], rollout["ref"], r):
        tokens = torch.tensor([prompt + response])
        before = value(tokens)[0, len(prompt) - 1:-1]                      # V before each token
        kl = (old - ref)[len(prompt) - 1:len(prompt) - 1 + len(response)]
        for t in range(len(response)):
            losses.append(0.5 * (before[t] - (score - beta * kl[t:].sum())) ** 2)
    close(recorders[1].seen[0], exact_gradient(torch.stack(losses).mean(), value))


def test_whitening_leaves_the_direction_exact(double):
    """With whitened advantages, and each word drawn as often as π says, the gradient is still J's,
    divided by the standard deviation of r: the mean that whitening subtracts is no part of it.

    Catches means that are taken over padding too."""
    run, config = ppo_run(gae_lambda=1.0, gradient_clip=1e9, kl_coefficient=0.0)
    policy, value = small(LanguageModel, 0, tie_embeddings=False), small(ScalarModel, 1)
    policy.lm_head.weight.data.zero_()                                     # π = 1/4 for each word
    r = torch.tensor([0.3, -1.0, 0.5, 2.0])
    rollout = rollout_of([PROMPTS[0]] * V, [[a] for a in range(V)], scores=r.tolist(),
                         old=[-math.log(V)] * V, ref=[0.0] * V, values=[0.0] * V)
    rollout["ended"][:] = True
    recorders = Recorder(policy), Recorder(value)
    ppo.update(run, config, (policy, value), recorders, rollout, 0)
    pi = policy(torch.tensor(PROMPTS[:1]))[0, -1].softmax(-1)
    expected = exact_gradient((pi * r).sum() / r.std(correction=0), policy)
    assert expected.abs().max() > 0.05
    close(-recorders[0].seen[0], expected, 1e-7)                # 1e-8 stands in the square root


def test_pretraining_gradient_is_added(double, monkeypatch):
    """PPO-ptx: the policy's gradient is PPO's plus γ times that of the mean next-token loss on
    windows of pretraining text, whatever the micro-batch (Ouyang et al. 2022, eq. 2); the value
    function's is not touched.

    Catches a mean of means, a window without its last target, windows drawn anew by micro-batch."""
    text, starts = np.arange(3000) ** 2 % 7 % V, [5, 0, 2935, 17, 18, 2000, 900]

    class Draws:
        """Random numbers that say which windows are drawn."""
        permutation = staticmethod(np.arange)

        def integers(self, high, size):
            assert (high, size) == (2936, 7)
            return starts

    monkeypatch.setattr(ppo, "random_stream", lambda seed, *purpose: Draws())

    def gradients_of(**options):
        run, config = ppo_run(gradient_clip=1e9, minibatch_size=7, **options)
        policy, value = small(LanguageModel, 0, block_size=80), small(ScalarModel, 1)
        prompts, responses = zip(*EVERYTHING[:7])
        rollout = rollout_of(prompts, responses, scores=[math.sin(i) for i in range(7)],
                             old=[-1.5] * 7, ref=[-1.0] * 7, values=[0.1 * i for i in range(7)])
        recorders = Recorder(policy), Recorder(value)
        ppo.update(run, config, (policy, value), recorders, rollout, 0, text)
        return policy, recorders[0].seen[0], recorders[1].seen[0]

    _, plain, plain_value = gradients_of()
    windows = torch.from_numpy(np.stack([text[i:i + 65] for i in starts]))
    for micro_batch_size in (64, 2):
        policy, found, found_value = gradients_of(ptx_coefficient=27.8,
                                                  micro_batch_size=micro_batch_size)
        log_p = policy(windows[:, :-1]).log_softmax(-1)
        mean_loss = -log_p.gather(2, windows[:, 1:, None]).mean()
        close(found, plain + 27.8 * exact_gradient(mean_loss, policy))
        close(found_value, plain_value)
        assert (found - plain).abs().max() > 0.1


# --------------------------------------------------------------------------------------------------
# The rollout

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollouts_follow_the_policy(dtype):
    """Responses come as often as the policy says, word for word, at the temperature of the
    log-probabilities, and others in every iteration.

    Catches greedy rollouts by accident, sampling at another temperature or with top-k, one stream
    of random numbers for all iterations."""
    n = 6000
    run, config = ppo_run(max_new_tokens=2, dtype=dtype)
    policy, records = small(LanguageModel, 0), [r for r in RECORDS for _ in range(n)]
    responses = respond(policy, Words(), records, run, ("rollout", 3), 0.8)
    prompts = [prompt_ids(Words(), record["prompt"]) for record in records]
    drawn = list(zip(prompts, responses))
    with torch.no_grad(), run.autocast():
        probabilities = log_probabilities(policy, 0.8).exp().tolist()
    for pair, probability in zip(EVERYTHING, probabilities):
        four_standard_errors = 4 * (probability / n) ** 0.5
        assert drawn.count(pair) / n == pytest.approx(probability, abs=four_standard_errors), pair
    assert respond(policy, Words(), records[:50], run, ("rollout", 4), 0.8) != responses[:50]


# --------------------------------------------------------------------------------------------------
# The optimum

class RewardTable(nn.Module):
    """In place of a reward model: r of every whole sequence, and nothing that could be read at any
    other token."""

    def __init__(self, rewards):
        super().__init__()
        self.rewards = {tuple(p + y): r for (p, y), r in zip(EVERYTHING, rewards.tolist())}

    def forward(self, tokens, lengths):
        return torch.tensor([self.rewards[tuple(row[:n])]
                             for row, n in zip(tokens.tolist(), lengths.tolist())])


def train_to_the_optimum(seed, beta=0.5, steps=70, n=512, rate=3e-3):
    """PPO as ppo.py does it, on rewards drawn from N(0, 1). Returns KL(π‖π*) before and after, the
    figures of the last iteration, and J*."""
    torch.manual_seed(seed)
    shape = ModelConfig(n_layer=1, n_head=2, n_kv_head=1, n_embd=32, n_inner=64, block_size=8,
                        vocab_size=V)
    policy, reference, value = LanguageModel(shape), LanguageModel(shape), ScalarModel(shape)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(2 if p.dim() == 2 else 1)                               # π_ref is not uniform
    reference.load_state_dict(policy.state_dict())
    rewards = torch.randn(len(EVERYTHING))
    run, config = ppo_run(seed=seed, minibatch_size=n // 4, micro_batch_size=n, max_new_tokens=2,
                          missing_end_penalty=0.0, max_steps=steps, kl_coefficient=beta)
    optimizers = [Optimizer(m, rate, betas=(0.9, 0.999), eps=1e-5) for m in (policy, value)]
    models, records = (policy, reference, value, RewardTable(rewards)), RECORDS * (n // 2)
    prompts = PROMPTS * (n // 2)

    @torch.no_grad()
    def distance():
        """KL(π‖π*), π* ∝ π_ref exp(r/β), a mean over the prompts; and J* = β log Z."""
        log_pi, log_ref = (log_probabilities(m).double().view(2, -1) for m in (policy, reference))
        r = rewards.double().view(2, -1)
        log_z = (log_ref + r / beta).logsumexp(1, keepdim=True)
        kl = (log_pi.exp() * (log_pi - (log_ref + r / beta - log_z))).sum(1)
        J = (log_pi.exp() * (r - beta * (log_pi - log_ref))).sum(1)
        close(beta * log_z.squeeze(1) - J, beta * kl, 1e-5)       # an identity: J* - J = β KL(π‖π*)
        return kl.mean().item(), beta * log_z.mean().item()

    before, _ = distance()
    for step in range(steps):
        responses = respond(policy, Words(), records, run, ("rollout", step), 1.0)
        rollout = ppo.score_rollout(run, config, models, prompts, responses, END)
        figures = ppo.update(run, config, (policy, value), optimizers, rollout, step)
    after, best = distance()
    return before, after, figures, best


def ends_at_the_optimum(seed):
    """(KL(π‖π*) at the end, distance of the logged reward - β KL from J*) of one training."""
    before, after, figures, best = train_to_the_optimum(seed)
    assert before > 1
    return after, abs(figures["reward"] - 0.5 * figures["kl"] - best)


def test_ppo_finds_the_known_optimum():
    """A Transformer trained by ppo.py's rollouts, scores and updates ends at π* ∝ π_ref exp(r/β),
    and the logged reward - β KL is J* = β log Z, of which there is no better.

    Catches what moves the fixed point: k3 or no KL in the reward, none at the last token, V shifted
    by one, a reference that is the policy itself, greedy rollouts, no exploration, a constant
    rate."""
    distance, gap = ends_at_the_optimum(seed=1)
    assert distance < 0.01
    assert gap < 0.02  # at π* every response is worth J*, so the mean of any sample is J*


@pytest.mark.slow
def test_ppo_finds_the_known_optimum_for_three_rewards():
    """The same for three drawings of the rewards, by the median: not the luck of one."""
    distances, gaps = zip(*[ends_at_the_optimum(seed) for seed in (1, 2, 3)])
    assert np.median(distances) < 0.01, distances
    assert np.median(gaps) < 0.02, gaps


# --------------------------------------------------------------------------------------------------
# Early stopping

@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_early_stop_takes_no_step(dtype):
    """Once the policy is too far from the rollout, an update ends *before* stepping. The weights
    and the optimizers are, bit for bit, those of an update that had the earlier minibatches only;
    the value function's too; and no gradient is left.

    Catches a stop that multiplies the loss by 0: Adam's momentum would move the weights all the
    same."""
    def update(**options):
        run, config = ppo_run(dtype=dtype, **options)
        policy, reference, value, judge = models = four_models()
        rollout = ppo.score_rollout(run, config, models, *zip(*EVERYTHING), END)
        optimizers = [Optimizer(m, 1e-2, betas=(0.9, 0.999), eps=1e-5) for m in (policy, value)]
        figures = ppo.update(run, config, (policy, value), optimizers, rollout, 0)
        state = []
        for module, optimizer in zip((policy, value), optimizers):
            assert all(p.grad is None for p in module.parameters())
            state += [p.detach() for p in module.parameters()]
            for part in optimizer.parts:
                state += [tensor for moments in part.state.values() for tensor in moments.values()]
        return figures["minibatches"], state

    n_once, once = update()
    n_stopped, stopped = update(epochs=4, kl_stop=1e-6)
    n_through, through = update(epochs=4, kl_stop=1e9)
    assert (n_once, n_stopped, n_through) == (1, 1, 4)
    assert len(stopped) == len(once) and all(map(torch.equal, stopped, once))
    assert not any(map(torch.equal, stopped, through))
