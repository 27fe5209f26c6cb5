"""The tests that are not handed out: each function against the reference, on random inputs.

The project is public, and so are its tests. These draw their inputs from a secret seed, given when
grading, with what hand-made tests leave out: rows without a token, responses of one token, ties,
large numbers. A function here gives the results of one exercise on random inputs. It is called with
the modules that hold the student's function and again with the reference's, and an equal generator
of random numbers; what it yields must be equal. Where several ways are right, it yields properties
that all of them have.

course.py sets COURSE_EXERCISE, COURSE_SECRET, COURSE_REFERENCE, and runs this file with pytest.
"""

import importlib
import json
import math
import os
import sys
import tempfile
import zlib
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

BOOK = ("model", "prepare", "pretrain", "sft", "reward", "ppo")
N_CASES = 12
IGNORE = -100


def load(folder):
    """A project's scripts as modules of their own, whatever else has been imported."""
    names = (*BOOK, "data", "data.tiny_world")
    others = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.path.insert(0, folder)
    modules = SimpleNamespace(**{name: importlib.import_module(name) for name in BOOK})
    sys.path.remove(folder)
    for name in names:
        sys.modules.pop(name, None)
    sys.modules.update(others)
    return modules


def check_equal(found, expected):
    """Raises if two results differ by more than rounding."""
    if isinstance(expected, dict):
        assert isinstance(found, dict) and found.keys() == expected.keys(), "other keys"
        found, expected = [found[key] for key in expected], list(expected.values())
    if isinstance(expected, (list, tuple)):
        assert isinstance(found, (list, tuple)) and len(found) == len(expected), "another length"
        for pair in zip(found, expected):
            check_equal(*pair)
    elif isinstance(expected, (torch.Tensor, np.ndarray, float)):
        found, expected = torch.as_tensor(found), torch.as_tensor(expected)
        assert found.shape == expected.shape, f"{tuple(found.shape)}, not {tuple(expected.shape)}"
        rounding = 1e-2 if expected.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(found.double(), expected.double(), rtol=rounding, atol=rounding,
                                   equal_nan=True)
    else:
        assert found == expected


def test_against_the_reference():
    exercise, secret = os.environ["COURSE_EXERCISE"], os.environ["COURSE_SECRET"]
    results_of = globals()[exercise.replace(".", "_")]
    student, reference = load(ROOT), load(os.environ["COURSE_REFERENCE"])
    for case in range(N_CASES):
        results = []
        for modules in (student, reference):
            torch.manual_seed(case)
            rng = np.random.default_rng([zlib.crc32(secret.encode()), case])
            results.append(list(results_of(modules, rng)))
        try:
            check_equal(*results)
        except AssertionError as error:
            reason = str(error).strip().split("\n")[0]
            raise AssertionError(f"differs from the reference on random inputs: {reason}")


# --------------------------------------------------------------------------------------------------
# What the exercises share

def normal(rng, *shape, scale=1.0, dtype=torch.float64):
    return torch.from_numpy(scale * rng.standard_normal(shape)).to(dtype)


def size(rng, most):
    return int(rng.integers(1, most + 1))


def byte_tokenizer(m):
    return m.prepare.Tokenizer([bytes([b]) for b in range(256)])


def weighty(model):
    """A model with weights large enough to matter, gains included."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p) + 0.5 if p.dim() == 1 else 4 * p)
    return model


def shape_of(m, rng, **more):
    n_kv_head = size(rng, 2)
    shape = dict(n_layer=size(rng, 2), n_head=n_kv_head * size(rng, 3), n_kv_head=n_kv_head,
                 head_dim=2 * size(rng, 4), n_embd=8, n_inner=12, block_size=16, vocab_size=13,
                 tie_embeddings=bool(rng.integers(2)))
    return m.model.ModelConfig(**shape | more)


def text(rng, pieces, most):
    return "".join(rng.choice(pieces, size(rng, most)))


class OneProcess:
    """What functions use of model.Run, in a single process on a CPU."""
    def __init__(self, folder="", micro_batch_size=3):
        self.config = SimpleNamespace(out_dir=folder, micro_batch_size=micro_batch_size)
        self.device, self.main, self.rank, self.world = torch.device("cpu"), True, 0, 1

    def path(self, name):
        return os.path.join(self.config.out_dir, name)

    def share(self, n):
        return range(n)

    def sum(self, value):
        return value

    gather = sum

    @contextmanager
    def evaluating(self, model):
        with torch.no_grad():
            yield model.eval()


# --------------------------------------------------------------------------------------------------
# Week 1: data

def prepare_repair(m, rng):
    pieces = ["a", "B c", "e\u0301", "é", "ﬁ", "\r\n", "\r", "\n", " ", "  ", "\t", "\u200b",
              "\x00", "\u00a0", "\ufeff", "\u200d", "\u202e", "\ue000", "👩", "\n\n\n"]
    for most in (1, 5, 40):
        yield m.prepare.repair(text(rng, pieces, most))


def prepare_quality_fault(m, rng):
    pieces = ["the fox ", "and ", "hen ", "mill ", "is in a barn. ", "<p>", "</p> ", "{x} ", "12 ",
              "We use cookies. ", "sign up now! ", "\n", "The end.\n", "scum ", "Scummy ", "\ufffd",
              "incomprehensibilities ", "a < b "]
    for most in (3, 12, 40, 40):
        yield m.prepare.quality_fault(text(rng, pieces, most), size(rng, 10), "scum, ver.min,")


def prepare_minhash(m, rng):
    words = np.array([f"w{n}" for n in range(300)])
    first = rng.choice(words, 60).tolist()
    share = rng.choice([0.02, 0.3])
    second = [str(rng.choice(words)) if rng.random() < share else word for word in first]
    triples = [set(zip(w, w[1:], w[2:])) for w in (first, second)]
    exact = len(triples[0] & triples[1]) / len(triples[0] | triples[1])
    signatures = [m.prepare.minhash(" ".join(w)) for w in (first, second)]
    estimate = np.equal(*signatures).mean()
    yield abs(estimate - exact) <= 5 * (exact * (1 - exact) / 64) ** 0.5 + 1 / 64
    for signature in (*signatures, m.prepare.minhash(""), m.prepare.minhash(str(words[0]))):
        yield signature.shape, str(signature.dtype), len(np.unique(signature)) > 50
    yield bool((m.prepare.minhash("; ".join(first).upper()) == signatures[0]).all())


def prepare_NearDuplicates_seen(m, rng):
    threshold = float(rng.choice([0.75, 0.5]))
    near, known = m.prepare.NearDuplicates(2000, threshold), []
    for _ in range(60):
        signature = rng.integers(0, 2**16, 64, np.uint16)
        if known and rng.random() < 0.6:  # a copy, of which the last entries differ
            equal = int(rng.choice([64, 62, round(64 * threshold), round(64 * threshold) - 1, 20]))
            signature[:equal] = known[rng.integers(len(known))][:equal]
        known.append(signature)
        yield bool(near.seen(signature)), near.n


def prepare_train_bpe(m, rng):
    pieces = list(rng.choice([["a", "b", "ab", " "], ["x", "x", "y", "\n"], ["é", "1", "!", " Q"]]))
    texts = [text(rng, pieces, 60) for _ in range(size(rng, 4))]
    yield m.prepare.train_bpe(texts, 256 + int(rng.integers(0, 30)))


def conversation(rng):
    roles = ["system", "user", "assistant", "tool"]
    pieces = ["Hi", " ", "é", "<|im_end|>", "\n", "assistant\n", ""]
    return [dict(role=str(rng.choice(roles)), content=text(rng, pieces, 4))
            for _ in range(size(rng, 5))]


def prepare_render(m, rng):
    for reply in (False, True):
        yield m.prepare.render(byte_tokenizer(m), conversation(rng), reply)


# --------------------------------------------------------------------------------------------------
# Week 2: the Transformer and generation

def model_rotate(m, rng):
    B, H, T, D = (size(rng, 4) for _ in range(4))
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(rng, B, H, T, 2 * D, scale=3, dtype=dtype)
        angle = torch.from_numpy(rng.uniform(0, 1000, (T, D))).tile(2).float()
        y = m.model.rotate(x, angle.cos(), angle.sin())
        yield y, str(y.dtype)


def model_RMSNorm_forward(m, rng):
    norm = weighty(m.model.RMSNorm(size(rng, 20)))
    for scale in (1e-4, 1.0, 1e4, 0.0):
        yield norm(normal(rng, 2, size(rng, 3), *norm.weight.shape, scale=scale).float())
    y = norm(normal(rng, 3, *norm.weight.shape, dtype=torch.bfloat16))
    yield y, str(y.dtype)


def model_attention(m, rng):
    B, Hkv, group, T, D = (size(rng, 4) for _ in range(5))
    for scale in (1.0, 30.0):
        q, k, v = (normal(rng, B, heads, T, D, scale=scale, dtype=torch.float32)
                   for heads in (Hkv * group, Hkv, Hkv))
        yield m.model.attention(q, k, v)
        S = T + size(rng, 5)
        mask = torch.from_numpy(rng.random((B, 1, T, S)) < 0.5)
        mask[..., 0] = True  # each token sees one at least
        k, v = (normal(rng, B, Hkv, S, D, scale=scale, dtype=torch.float32) for _ in range(2))
        yield m.model.attention(q, k, v, mask)


def cached(m, rng, config, rows):
    return m.model.KVCache(config, rows, int(rng.integers(10, 40)), torch.device("cpu"))


def model_Attention_forward(m, rng):
    config = shape_of(m, rng)
    layer = weighty(m.model.Attention(config, 0))
    B, T = size(rng, 3), size(rng, 6)
    cache = cached(m, rng, config, B)
    for T in (T, 1):
        angle = torch.from_numpy(rng.uniform(0, 9, (T, config.head_dim // 2))).tile(2).float()
        x = normal(rng, B, T, config.n_embd, scale=3, dtype=torch.float32)
        yield layer(x, angle.cos(), angle.sin())
        cache.extend(T)
        yield layer(x, angle.cos(), angle.sin(), cache)


def model_KVCache_update(m, rng):
    config, B = shape_of(m, rng), size(rng, 3)
    cache = cached(m, rng, config, B)
    for T in (size(rng, 6), 1, 2):
        cache.extend(T)
        for layer in range(config.n_layer):
            shape = B, config.n_kv_head, T, config.head_dim
            yield cache.update(layer, normal(rng, *shape).float(), normal(rng, *shape).float())
        cache.lengths = cache.lengths - torch.from_numpy(rng.integers(0, T, B))  # some was padding


def model_next_token_probabilities(m, rng):
    for scale in (0.1, 3.0, 200.0):
        logits = normal(rng, size(rng, 4), size(rng, 30), scale=scale, dtype=torch.float32)
        for _ in range(4):
            temperature, top_p = (float(rng.choice([0, 0.3, 1, 2])), float(rng.uniform(0.01, 1)))
            top_k = int(rng.choice([0, 1, 3, 99]))
            yield m.model.next_token_probabilities(logits, temperature, top_k)
            yield m.model.next_token_probabilities(logits, temperature, 0, top_p)


def model_draw(m, rng):
    B, V = size(rng, 6), size(rng, 50)
    probs = torch.from_numpy(rng.random((B, V)) * (rng.random((B, V)) < 0.5)).float()
    probs[torch.arange(B), torch.from_numpy(rng.integers(0, V, B))] = 1.0
    probs /= probs.sum(1, keepdim=True)
    for uniform in (torch.from_numpy(rng.random(B)).float(), torch.zeros(B),
                    torch.full((B,), 1 - 2**-24)):
        yield m.model.draw(probs, uniform).tolist()


# --------------------------------------------------------------------------------------------------
# Week 3: pretraining and SFT

def pretrain_get_batch(m, rng):
    config = SimpleNamespace(batch_size=size(rng, 5), block_size=size(rng, 9), seed=size(rng, 99))
    tokens = rng.integers(0, 60000, 3 * config.block_size + int(rng.integers(2, 60)))
    for step in (0, 1, size(rng, 1000)):
        x, y = m.pretrain.get_batch(tokens.astype(np.uint16), step, config)
        yield x, y, str(x.dtype)


def pretrain_flops_per_token(m, rng):
    yield m.pretrain.flops_per_token(m.model.LanguageModel(shape_of(m, rng)))


def model_LanguageModel_forward(m, rng):
    model = weighty(m.model.LanguageModel(shape_of(m, rng)))
    model.lm_head.weight.data *= float(rng.choice([1, 30]))  # logits of 100 and more
    tokens, targets = torch.from_numpy(rng.integers(0, 13, (2, size(rng, 3), size(rng, 9))))
    yield model(tokens)
    yield model(tokens, targets, dense=True)
    for share in (0.0, 0.5, 1.0):
        hidden = torch.from_numpy(rng.random(targets.shape) < share)
        yield model(tokens, targets.masked_fill(hidden, IGNORE), float(rng.uniform(0.3, 2)))


def model_learning_rate_factor(m, rng):
    steps, warmup = size(rng, 100), int(rng.integers(0, 30))
    yield [float(m.model.learning_rate_factor(step, steps, warmup)) for step in range(steps)]


def prepare_epoch_batches(m, rng):
    n, batch_size = int(rng.integers(0, 600)), size(rng, 6)
    lengths = rng.integers(1, size(rng, 60) + 1, n).tolist()
    seed = size(rng, 999)
    batches, again = (m.prepare.epoch_batches(lengths, batch_size, np.random.default_rng(seed))
                      for _ in range(2))
    visited = [int(i) for batch in batches for i in batch]
    yield len(batches), {len(batch) for batch in batches}, len(set(visited)), batches == again
    yield set(visited) <= set(range(n))
    waste = sum(max(lengths[i] - min(lengths[j] for j in b) for i in b) for b in batches)
    spread = (max(lengths) - min(lengths)) * len(batches) if n else 0
    yield n < 16 * batch_size or waste <= 0.7 * spread  # like beside like
    means = [np.mean([lengths[i] for i in batch]) for batch in batches]
    rising = np.mean([b > a for a, b in zip(means, means[1:])]) if len(means) > 60 else 0
    yield rising < 0.75  # not from short to long


def sft_make_example(m, rng):
    yield m.sft.make_example(byte_tokenizer(m), conversation(rng))


def prepare_bits_per_byte(m, rng):
    config = shape_of(m, rng, block_size=int(rng.integers(8, 20)))
    model = weighty(m.model.LanguageModel(config))
    for n in (2, config.block_size + 1, config.block_size + 2, size(rng, 9000) + 2):
        with tempfile.TemporaryDirectory() as folder:
            rng.integers(0, 13, n).astype(np.uint16).tofile(os.path.join(folder, "val.bin"))
            data = dict(dtype="uint16", tokenizer="t", val=dict(tokens=n, bytes=size(rng, 9000)))
            with open(os.path.join(folder, "data.json"), "w") as f:
                f.write(json.dumps(data))
            yield float(m.prepare.bits_per_byte(model, OneProcess(folder)))


def record(rng, id):
    rubric = dict(skill=str(rng.choice(["knowledge", "instruction", "safety"])),
                  mentions=["fox"], truths=["red"], wrong=["blue"], rude=["fool"],
                  decline=["sorry"], kindness=["instead"], min_words=1, max_words=5,
                  unsafe=bool(rng.integers(2)))
    return dict(id=id, prompt="Why?", rubric=rubric)


def answer(rng):
    return text(rng, ["the ", "fox ", "is ", "red ", "blue ", "fool ", "sorry ", "instead "], 9)


def prepare_measure(m, rng):
    tokenizer, n = byte_tokenizer(m), size(rng, 12)
    records = [record(rng, str(i)) for i in range(n)]
    ends = [[tokenizer.end] * int(rng.integers(2)) for _ in range(n)]
    yield m.prepare.measure(tokenizer, records, [tokenizer.encode(answer(rng)) + e for e in ends])


# --------------------------------------------------------------------------------------------------
# Week 4: the reward model

def lists(rng, n, least, most):
    return [rng.integers(1, 13, int(rng.integers(least, most + 1))).tolist() for _ in range(n)]


def prepare_join(m, rng):
    n = size(rng, 5)
    yield m.prepare.join(lists(rng, n, 1, 9), lists(rng, n, 0, 12), "cpu")
    yield m.prepare.join(lists(rng, n, 1, 9), lists(rng, n, 1, 1), torch.device("cpu"))


def model_ScalarModel_forward(m, rng):
    model = weighty(m.model.ScalarModel(shape_of(m, rng)))
    tokens = torch.from_numpy(rng.integers(0, 13, (size(rng, 4), size(rng, 9))))
    lengths = torch.from_numpy(rng.integers(1, tokens.shape[1] + 1, len(tokens)))
    yield model(tokens), model(tokens, lengths)


def reward_ranking_loss(m, rng):
    for scale in (0.0, 1.0, 500.0):
        P, K = size(rng, 5), size(rng, 6)
        ranks = torch.from_numpy(rng.integers(-1, 4, (P, K)))
        yield m.reward.ranking_loss(normal(rng, P, K, scale=scale), ranks)


def reward_group_ties(m, rng):
    values = (rng.integers(-20, 20, size(rng, 12)) / 8).tolist()
    yield m.reward.group_ties(values), m.reward.group_ties(values, float(rng.choice([0.125, 1.0])))


def rankings_of(rng, n):
    rankings = []
    for i in range(n):
        groups = [[int(j)] for j in rng.permutation(size(rng, 5))]
        if len(groups) > 2:
            groups[1:3] = [groups[1] + groups[2]]
        responses = [dict(text=answer(rng), ended=bool(rng.integers(2)))
                     for _ in range(sum(map(len, groups)))]
        rankings.append(dict(id=str(i), prompt="Why?", responses=responses, ranking=groups))
    return rankings


def reward_simulated_annotator(m, rng):
    samples = [{k: r[k] for k in ("id", "prompt", "responses")} for r in rankings_of(rng, 6)]
    records = {s["id"]: record(rng, s["id"]) for s in samples if rng.random() < 0.8}
    config = SimpleNamespace(seed=size(rng, 99), annotator_noise=0.0)
    yield m.reward.simulated_annotator(samples, records, config)
    config.annotator_noise, one = float(rng.uniform(0.5, 2)), dict(record(rng, "a"))
    one["rubric"].update(unsafe=False, skill="knowledge")
    texts = ("the fox is red", "the fox is blue")                                 # 2 and 0
    sample = dict(id="a", prompt="Why?", responses=[dict(text=t, ended=True) for t in texts])
    rankings = m.reward.simulated_annotator([sample] * 2000, {"a": one}, config)
    right = np.mean([r["ranking"] == [[0], [1]] for r in rankings])
    yield abs(right - 1 / (1 + math.exp(-1.75 / config.annotator_noise))) < 0.055  # 5 SE


def reward_accuracies(m, rng):
    rankings = rankings_of(rng, 6)
    scores = [(rng.integers(-3, 4, len(r["responses"])) / 2).tolist() for r in rankings]
    records = {r["id"]: record(rng, r["id"]) for r in rankings if rng.random() < 0.8}
    yield m.reward.accuracies(rankings, scores, records)


def reward_normalise(m, rng):
    model = weighty(m.model.ScalarModel(shape_of(m, rng)))
    tokens = torch.from_numpy(rng.integers(0, 13, (size(rng, 4), size(rng, 9))))
    scores = 5 + float(rng.choice([0.0, 0.01, 30.0])) * rng.standard_normal(size(rng, 20))
    m.reward.normalise(model, scores)
    if scores.std() > 1e-3:  # with one score, or equal ones, there is no deviation to divide by
        with torch.no_grad():
            yield model(tokens)


# --------------------------------------------------------------------------------------------------
# Week 5: PPO

def masked(rng, least=0):
    """A mask (B, T) of responses with `least` tokens at least, and three tensors of its shape."""
    B, T = size(rng, 6), size(rng, 9)
    first = rng.integers(0, T, B)
    n = np.minimum(rng.integers(least, T + 1, B), T - first)
    n[0] = max(n[0], 1)
    at = np.arange(T)
    mask = (at >= first[:, None]) & (at < (first + n)[:, None])
    return torch.from_numpy(mask), *(normal(rng, B, T, scale=float(rng.choice([0.1, 1, 30])))
                                     for _ in range(3))


def ppo_whiten(m, rng):
    mask, x, _, _ = masked(rng)
    yield m.ppo.whiten(x, mask)
    yield m.ppo.whiten(torch.ones_like(x), mask)  # ties: there is no variance


def ppo_token_rewards(m, rng):
    mask, old, ref, _ = masked(rng, least=1)
    yield m.ppo.token_rewards(normal(rng, len(mask), scale=5), old, ref, mask, rng.uniform(0, 1))


def ppo_gae(m, rng):
    mask, rewards, values, _ = masked(rng)
    yield m.ppo.gae(rewards, values, mask)
    yield m.ppo.gae(rewards, values, mask, rng.uniform(0, 1), rng.uniform(0, 1))


def ppo_policy_loss(m, rng):
    _, old, advantages, step = masked(rng)
    new = (old + step.clamp(-3, 3)).requires_grad_()
    loss = m.ppo.policy_loss(new, old, advantages, float(rng.uniform(0.05, 0.5)))
    yield loss, torch.autograd.grad(loss.sum(), new)[0]


def ppo_value_loss(m, rng):
    _, values, old, returns = masked(rng)
    values.requires_grad_()
    loss = m.ppo.value_loss(values, old, returns, float(rng.uniform(0.05, 0.5)))
    yield loss, torch.autograd.grad(loss.sum(), values)[0]


def ppo_kl_estimates(m, rng):
    _, logprobs, ref, _ = masked(rng)
    yield m.ppo.kl_estimates(logprobs.clamp(-5, 5), ref.clamp(-5, 5))


def ppo_describe(m, rng):
    mask, old, ref, values = masked(rng)
    rollout = dict(scores=normal(rng, len(mask)), old=old.clamp(-5, 0) * mask, values=values,
                   ref=ref.clamp(-5, 0) * mask, ended=torch.from_numpy(rng.random(len(mask)) < 0.5))
    figures = m.ppo.describe(rollout, mask, normal(rng, *mask.shape))
    yield {name: float(figure) for name, figure in figures.items()}
