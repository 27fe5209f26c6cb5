"""model.py against independent references: Transformer, generation, optimizer, and what running a stage needs."""

import math
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as model_module
from helpers import float64
from model import (IGNORE, THREADS, HeadLoss, KVCache, LanguageModel, ModelConfig, Muon, Normalise, Optimizers, RMSNorm,
                   Run, RunConfig, ScalarModel, TrainConfig, attention, choose_dtype, draw, epoch_batches, generate,
                   learning_rate_factor, load_checkpoint, load_config, newton_schulz, next_token_probabilities, option,
                   pad)

STOP = 0


def tiny(n_head=4, n_kv_head=2, tie=True, **more):
    shape = dict(n_layer=2, n_embd=32, n_inner=48, block_size=24, vocab_size=19) | more
    return ModelConfig(n_head=n_head, n_kv_head=n_kv_head, tie_embeddings=tie, **shape)


def language_model(seed=0, scale=4.0, **shape):
    """A small model whose weights are large enough for logits, norms and attention to matter."""
    torch.manual_seed(seed)
    model = LanguageModel(tiny(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p) + 0.5 if p.dim() == 1 else p * scale)
    return model


def a_run(tmp_path, **settings):
    return Run(TrainConfig(out_dir=str(tmp_path), device="cpu", dtype="float32", **settings), "test")


def one_line(call, *words):
    """The call ends the program with a one-line message that holds these words."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message not in ("0", "None")
    for word in words:
        assert word in message, message


# ---------------------------------------------------------------------------------------------------------------------
# The Transformer

def reference_qwen3(weights, config, row):
    """Qwen3's forward pass for one row of ids, in numpy and float64, head by head and position by position."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    D, T, group = config.n_embd // config.n_head, len(row), config.n_head // config.n_kv_head

    def norm(x, gain):
        return np.stack([v / math.sqrt(sum(v * v) / len(v) + 1e-6) * gain for v in x])

    def turn(x):  # each pair (i, i + D/2) is a complex number, turned by e^(i·position·frequency)
        z = x[:, :D // 2] + 1j * x[:, D // 2:]
        frequency = np.array([config.rope_theta ** (-2 * i / D) for i in range(D // 2)])
        z = z * np.exp(1j * np.arange(T)[:, None] * frequency)
        return np.concatenate([z.real, z.imag], axis=1)

    x = w["model.embed_tokens.weight"][row]
    for n in range(config.n_layer):
        at = f"model.layers.{n}."
        h = norm(x, w[at + "input_layernorm.weight"])
        q, k, v = (h @ w[at + f"self_attn.{name}_proj.weight"].T for name in "qkv")
        heads = []
        for j in range(config.n_head):
            shared = j // group
            qj = turn(norm(q[:, j * D:(j + 1) * D], w[at + "self_attn.q_norm.weight"]))
            kj = turn(norm(k[:, shared * D:(shared + 1) * D], w[at + "self_attn.k_norm.weight"]))
            out = np.zeros((T, D))
            for t in range(T):
                weight = [math.exp(qj[t] @ kj[s] / math.sqrt(D)) for s in range(t + 1)]
                out[t] = sum(a * v[s, shared * D:(shared + 1) * D] for s, a in enumerate(weight)) / sum(weight)
            heads.append(out)
        x = x + np.concatenate(heads, axis=1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate = h @ w[at + "mlp.gate_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w[at + "mlp.up_proj.weight"].T)) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_logits_equal_an_independent_qwen3(tie, n_kv_head):
    """The forward pass is Qwen3's: float64 logits equal a reference written head by head with complex rotations."""
    model = language_model(n_kv_head=n_kv_head, tie=tie, rope_theta=500.0).double()
    config, trunk = model.model.config, model.model
    D = config.n_embd // config.n_head
    angle = np.outer(np.arange(len(trunk.cos)), [500.0 ** (-2 * (i % (D // 2)) / D) for i in range(D)])
    for table, exact in ((trunk.cos, np.cos(angle)), (trunk.sin, np.sin(angle))):
        assert (table - torch.from_numpy(exact)).abs().max() < 3e-6  # the tables are made in float32 …
        table.copy_(torch.from_numpy(exact))                        # … which is set aside here, to compare to 1e-9
    tokens = torch.randint(config.vocab_size, (2, 11))
    with torch.no_grad():
        logits = model(tokens).numpy()
    expected = np.stack([reference_qwen3(model.state_dict(), config, row.tolist()) for row in tokens])
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9)


TABLE = """
import math, torch, model
trunk = model.Transformer(model.ModelConfig(n_layer=1, vocab_size=9, block_size=256))
angle = torch.outer(torch.arange(len(trunk.cos)).float(), 1e4 ** (-torch.arange(0, 32, 2).float() / 32))
print(float((trunk.cos - torch.tensor([[math.cos(a) for a in row] for row in angle.tolist()]).repeat(1, 2)).abs().max()))
"""


def test_rotary_table_is_the_same_in_every_process():
    """The first cosines of a process are right to rounding, in ten of them one after another."""
    for _ in range(10):
        done = subprocess.run([sys.executable, "-c", TABLE], cwd=Path(__file__).parent.parent, text=True, check=True,
                              capture_output=True)
        assert float(done.stdout) < 1e-6


@pytest.mark.parametrize("tie", [True, False])
def test_state_dict_is_named_like_hugging_faces(tie):
    """The names and shapes of the state dict are those of Qwen3ForCausalLM, no more and no fewer."""
    c = tiny(tie=tie)
    D, C, I = c.n_embd // c.n_head, c.n_embd, c.n_inner
    expected = {"model.embed_tokens.weight": (c.vocab_size, C), "model.norm.weight": (C,),
                "lm_head.weight": (c.vocab_size, C)}
    for n in range(c.n_layer):
        expected |= {f"model.layers.{n}.{name}.weight": shape for name, shape in {
            "self_attn.q_proj": (c.n_head * D, C), "self_attn.k_proj": (c.n_kv_head * D, C),
            "self_attn.v_proj": (c.n_kv_head * D, C), "self_attn.o_proj": (C, c.n_head * D),
            "self_attn.q_norm": (D,), "self_attn.k_norm": (D,), "mlp.gate_proj": (I, C), "mlp.up_proj": (I, C),
            "mlp.down_proj": (C, I), "input_layernorm": (C,), "post_attention_layernorm": (C,)}.items()}
    model = LanguageModel(c)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def plain_attention(q, k, v, allowed):
    """softmax(q kᵀ / √D) v for heads that are grouped, one head after the other."""
    H, group, out = q.shape[1], q.shape[1] // k.shape[1], []
    for h in range(H):
        scores = q[:, h] @ k[:, h // group].mT / math.sqrt(q.shape[-1])
        weight = torch.where(allowed, scores, -math.inf).exp()
        out.append(weight / weight.sum(-1, keepdim=True) @ v[:, h // group])
    return torch.stack(out, 1)


def test_attention_float32_and_masked():
    """Attention in float32 is an explicit softmax over allowed keys: causal without a mask, else whatever it says."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(q, k, v), plain_attention(q, k, v, causal), rtol=0, atol=2e-6)
    mask = (torch.rand(2, 1, 7, 7) > 0.4) | torch.eye(7, dtype=torch.bool)
    torch.testing.assert_close(attention(q, k, v, mask), plain_attention(q, k, v, mask[:, 0]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("T, S", [(9, 9), (2, 9), (531, 531)])
def test_attention_bfloat16_on_cpu(T, S):
    """The hand-written bfloat16 path on CPUs agrees with the fused kernel and with float32 to bfloat16's rounding, over
    a short past, a cache whose rows have got to different places, and a past long enough to be halved twice; and so do
    its gradients."""
    torch.manual_seed(0)
    cached = T < S
    q, k, v = (torch.randn(3, n, t, 16).bfloat16().requires_grad_() for n, t in ((4, T), (2, S), (2, S)))
    ends = torch.tensor([5, 8, 2]) if cached else torch.full((3,), S - 1)
    allowed = torch.arange(S) <= (ends[:, None] - torch.arange(T).flip(0))[:, :, None]          # (3, T, S)
    y = attention(q, k, v, allowed[:, None] if cached else None)
    assert y.dtype == torch.bfloat16
    fused = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed[:, None], enable_gqa=True)
    exact = plain_attention(q.float(), k.float(), v.float(), allowed)
    torch.testing.assert_close(y, fused, rtol=0, atol=3e-2)
    torch.testing.assert_close(y.float(), exact, rtol=0, atol=3e-2)
    weight = torch.randn_like(exact)
    for ours, theirs in zip(*(torch.autograd.grad((x.float() * weight).sum(), (q, k, v)) for x in (y, exact))):
        assert (ours - theirs).float().norm() < 0.02 * theirs.float().norm()


@pytest.mark.parametrize("dtype, tolerance, size", [(torch.float64, 1e-12, 30), (torch.bfloat16, 0.01, 0.5)])
def test_head_loss_is_cross_entropy(dtype, tolerance, size):
    """Loss and gradients of the fused head are PyTorch's cross-entropy's, each row weighed on its own, over more words
    than one piece of rows holds, and at logits whose exponentials overflow."""
    with float64():
        torch.manual_seed(0)
        hidden, weight = torch.randn(300, 8), torch.randn(4000, 8) * size
        targets, importance = torch.randint(4000, (300,)), torch.randn(300)
        weight[targets[0]] = -1000 * size * hidden[0].sign()  # as unlikely as it gets
        hidden, weight = (x.to(dtype).requires_grad_() for x in (hidden, weight))
        ours = HeadLoss.apply(hidden, weight, targets)
        theirs = F.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="none")
        assert ours.isfinite().all() and (ours - theirs).abs().max() < tolerance * theirs.abs().max()
        for a, b in zip(*(torch.autograd.grad((x * importance).sum(), (hidden, weight)) for x in (ours, theirs))):
            assert a.dtype == dtype and (a.double() - b.double()).norm() < tolerance * b.double().norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 0.01)])
def test_normalise_is_rms_norm(dtype, tolerance):
    """RMSNorm and its gradients, as on a CPU in bfloat16, are those of PyTorch's in float64, for vectors of any length;
    under autocast the norm takes this path and gives bfloat16, its input's gradient stays float32."""
    with float64():
        torch.manual_seed(0)
        x, gain, importance = torch.randn(3, 5, 16) * torch.logspace(-2, 2, 5)[:, None], torch.rand(16), torch.randn(16)
        x, gain = (t.to(dtype).requires_grad_() for t in (x, gain))
        ours = Normalise.apply(x, gain, dtype)
        theirs = F.rms_norm(x.double(), (16,), gain.double(), eps=1e-6)
        assert ours.dtype == dtype and (ours.double() - theirs).norm() < tolerance * theirs.norm()
        gradients = [torch.autograd.grad((y * importance.to(y.dtype)).sum(), (x, gain)) for y in (ours, theirs)]
        for a, b in zip(*gradients):
            assert a.dtype == dtype and (a.double() - b.double()).norm() < 2 * tolerance * b.double().norm()
    x, norm = torch.randn(2, 16, requires_grad=True), RMSNorm(16)
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(x)
    assert y.dtype == torch.bfloat16 and "Normalise" in type(y.grad_fn).__name__
    assert torch.autograd.grad(y.float().square().sum(), x)[0].dtype == torch.float32


def test_padding_on_the_right_changes_nothing():
    """A row alone has the hidden states that it has in a padded batch, whatever the padding is."""
    model = language_model().double()
    rows = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2]]
    with torch.no_grad():
        for value in (0, 7):
            batch = model.model(pad(rows, value))
            for row, hidden in zip(rows, batch):
                alone = model.model(torch.tensor([row]))[0]
                torch.testing.assert_close(hidden[:len(row)], alone, rtol=0, atol=1e-12)


def test_loss_is_cross_entropy_of_the_targets():
    """With targets: -log p of each one, 0 where it is IGNORE, at the temperature given, with the right gradient."""
    model = language_model(tie=False)
    tokens = torch.randint(19, (3, 6))
    targets = torch.randint(19, (3, 6))
    targets[0, 2:], targets[2] = IGNORE, IGNORE
    for temperature in (1.0, 0.7):
        loss = model(tokens, targets, temperature)
        log_p = (model(tokens) / temperature).log_softmax(-1)
        by_hand = torch.zeros(3, 6)
        for b in range(3):
            for t in range(6):
                if targets[b, t] != IGNORE:
                    by_hand[b, t] = -log_p[b, t, targets[b, t]]
        torch.testing.assert_close(loss, by_hand, rtol=0, atol=1e-5)
        assert (loss[targets == IGNORE] == 0).all() and (loss[targets != IGNORE] > 0).all()
        gradient, = torch.autograd.grad(loss.sum(), model.lm_head.weight)
        wanted = F.cross_entropy((model(tokens) / temperature).flatten(0, 1), targets.flatten(), reduction="sum")
        expected, = torch.autograd.grad(wanted, model.lm_head.weight)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_scalar_model_stands_on_the_same_trunk():
    """With a language model's weights a scalar model has its hidden states (catches a final norm applied twice), and a
    shallower one its lower layers; only the head is missing."""
    lm = language_model()
    same, lower = ScalarModel(tiny()), ScalarModel(tiny(n_layer=1))
    for model in (same, lower):
        assert model.load_state_dict(lm.state_dict(), strict=False).missing_keys == ["score.weight", "score.bias"]
    tokens = torch.randint(19, (2, 5))
    with torch.no_grad():
        assert torch.equal(same.model(tokens), lm.model(tokens))
        by_hand = same.model(tokens) @ same.score.weight[0] + same.score.bias
        torch.testing.assert_close(same(tokens), by_hand)
        cos, sin = lm.model.cos[:5], lm.model.sin[:5]
        first = lm.model.norm(lm.model.layers[0](lm.model.embed_tokens(tokens), cos, sin))
        assert torch.equal(lower.model(tokens), first)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [[5, 6, 7], [1], [2, 3, 4, 5, 6, 7, 8], [9, 9], [11, 12, 13, 14]]
SAMPLERS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 6, 0.7), (0, 0, 1.0)]


def uniforms(rows, width, seed=0):
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))


def sampling_model(scale=4.0, **shape):
    """A model that is unsure of the next token, so that rows differ and end at different times."""
    model = language_model(scale=scale, tie=False, **shape)
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 1.5
    return model


@pytest.mark.parametrize("temperature,top_k,top_p", SAMPLERS)
def test_generate_gives_teacher_forced_logprobs(temperature, top_k, top_p):
    """Log-probabilities with the KV cache are those of one pass over the whole text, for every sampler (catches
    sampling at one temperature or top-k while log-probabilities are taken at another)."""
    model = sampling_model()
    responses, logprobs = generate(model, PROMPTS, 12, STOP, uniforms(5, 12), temperature, top_k, top_p)
    if temperature:
        assert len({len(r) for r in responses}) > 2
    for prompt, response, found in zip(PROMPTS, responses, logprobs):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response]))[0, len(prompt) - 1:-1]
        p = next_token_probabilities(logits, temperature, top_k, top_p)
        expected = p[range(len(response)), response].log()
        torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_generate_row_alone_equals_row_in_batch():
    """A row's text depends on its own prompt and random numbers alone, and the same numbers give the same text."""
    model, u = sampling_model(), uniforms(5, 12)
    together = generate(model, PROMPTS, 12, STOP, u)
    assert together == generate(model, PROMPTS, 12, STOP, u)
    assert together[0] != generate(model, PROMPTS, 12, STOP, uniforms(5, 12, seed=1))[0]
    for i, prompt in enumerate(PROMPTS):
        (alone,), (logprobs,) = generate(model, [prompt], 12, STOP, u[i:i + 1])
        assert alone == together[0][i]
        np.testing.assert_allclose(logprobs, together[1][i], atol=1e-5)


def test_generate_is_greedy_at_temperature_0():
    """Temperature 0 takes the likeliest token each time, with log-probability 0, and no other temperature does (catches
    rollouts that are greedy by accident)."""
    model = sampling_model()
    responses, logprobs = generate(model, PROMPTS, 8, STOP, uniforms(5, 8), temperature=0)
    for prompt, response in zip(PROMPTS, responses):
        text = list(prompt)
        for token in response:
            with torch.no_grad():
                assert token == model(torch.tensor([text]))[0, -1].argmax()
            text.append(token)
    assert all(l == 0 for row in logprobs for l in row)
    assert generate(model, PROMPTS, 8, STOP, uniforms(5, 8))[0] != responses


def test_generate_stops_where_it_should():
    """A response ends with its first `stop`, after max_new_tokens, or where the context is full; never elsewhere."""
    model, seen = sampling_model(), {i: [] for i in range(40)}
    prompts = [PROMPTS[i % 5] for i in range(40)]
    responses, _ = generate(model, prompts, 9, STOP, uniforms(40, 9), on_token=lambda row, t: seen[row].append(t))
    assert all(STOP not in r[:-1] and (r[-1] == STOP or len(r) == 9) for r in responses)
    assert {r[-1] == STOP for r in responses} == {True, False}
    assert responses == list(seen.values())


def test_generate_fills_the_context():
    """Without an end every row goes on to exactly block_size tokens, however long its neighbours' prompts are."""
    model = sampling_model()
    for prompts in ([[1] * 23], [[2, 3]], [[1] * 20, [1] * 20], [[1] * 20, [2, 3], [4]]):
        responses, logprobs = generate(model, prompts, 40, -1, uniforms(len(prompts), 40))
        assert [len(p) + len(r) for p, r in zip(prompts, responses)] == [24] * len(prompts)
        for prompt, response, found in zip(prompts, responses, logprobs):
            with torch.no_grad():
                expected = -model(torch.tensor([prompt + response[:-1]]),
                                  torch.tensor([[IGNORE] * (len(prompt) - 1) + response]))[0, len(prompt) - 1:]
            torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=1e-5)


def test_generate_reads_only_what_is_new_in_a_conversation():
    """With a cache that is kept from turn to turn the responses are those without one, whether a prompt goes on from the
    last response, departs from it, repeats or starts anew; and only what is new is read."""
    model, u, read = sampling_model(block_size=64), uniforms(1, 8), []
    cache, ids, response = KVCache(model.model.config, 1, 64, "cpu"), [], []
    model.model.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    for turn, new in ((lambda: [1, 5, 6], 3), (lambda: ids + response + [7, 8, 9], 4), (lambda: ids[:4] + [9] * 13, 13),
                      (lambda: ids, 1), (lambda: ids[:-5], 1), (lambda: [6, 1, 2], 3)):
        ids = turn()
        expected = generate(model, [ids], 8, STOP, u)
        read.clear()
        (response,), (logprobs,) = generate(model, [ids], 8, STOP, u, cache=cache)
        assert response == expected[0][0] and read == [new] + [1] * (len(response) - 1)
        np.testing.assert_allclose(logprobs, expected[1][0], atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_without_sorting_all(scale, top_p):
    """The likeliest words are looked for among the first few, then among more: the result is that of a full sort, for
    flat distributions and for peaked ones, over a vocabulary that is larger than both."""
    logits = scale * torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    p = (logits + 1e-4 * torch.arange(3000)).double().softmax(-1)  # no two alike
    found = next_token_probabilities(logits + 1e-4 * torch.arange(3000), top_p=top_p)
    for row, got in zip(p, found):
        ordered, order = row.sort(descending=True)
        n = int((ordered.cumsum(-1) < top_p).sum()) + 1
        assert abs(int((got > 0).sum()) - n) <= 1  # by rounding
        expected = ordered[:n - 1] / ordered[:n].sum()
        torch.testing.assert_close(got[order[:n - 1]].double(), expected, rtol=2e-3, atol=1e-6)


def test_generate_refuses_a_prompt_that_fills_the_context():
    """A prompt without room for an answer ends the program in one line."""
    one_line(lambda: generate(sampling_model(), [[1] * 24], 4, STOP, uniforms(1, 4)), "24", "block_size")


def test_next_token_probabilities_by_hand():
    """Temperature, top-k and top-p against distributions worked out by hand."""
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def check(expected, temperature=1.0, **how):
        found = next_token_probabilities(p.log(), temperature, **how)
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float32), rtol=0, atol=1e-6)

    check([0.1, 0.4, 0.2, 0.3])
    check([1 / 30, 16 / 30, 4 / 30, 9 / 30], temperature=0.5)
    check([0, 1, 0, 0], temperature=0)
    check([0, 4 / 7, 0, 3 / 7], top_k=2)
    check([0, 1, 0, 0], top_k=1)
    check([0.1, 0.4, 0.2, 0.3], top_k=9)
    check([0, 4 / 7, 0, 3 / 7], top_p=0.65)
    check([0, 4 / 9, 2 / 9, 3 / 9], top_p=0.75)
    check([0, 1, 0, 0], top_p=0.1)
    check([0, 1, 0, 0], top_k=2, top_p=0.55)            # of the two left, 4/7 > .55 is enough
    check([0, 4 / 7, 0, 3 / 7], top_k=2, top_p=0.6)     # and here it is not


def test_draw_follows_the_probabilities():
    """Frequencies of 100,000 draws fit the distribution (chi square), and what has probability 0 is never drawn."""
    p = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.45, 0.2, 0.0])
    n = 100_000
    tokens = draw(p.expand(n, -1), uniforms(n, 1).squeeze(1))
    counts = torch.bincount(tokens, minlength=7)
    assert (counts[p == 0] == 0).all()
    expected = n * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 16.3     # 3 degrees of freedom: 1 in 1,000 is above
    ends = torch.tensor([0.0, 1 - 2 ** -24])                             # the least and the largest that rand() gives
    assert draw(p.expand(2, -1), ends).tolist() == [1, 5]


def test_epoch_batches():
    """An epoch visits every example once, is a function of its key alone, and another key groups otherwise."""
    lengths = [(7 * i) % 23 for i in range(101)]
    batches = epoch_batches(lengths, 4, (1, 0))
    assert sorted(i for b in batches for i in b) == list(range(101))
    assert len(batches) == 26 and all(1 <= len(b) <= 4 for b in batches)
    assert batches == epoch_batches(lengths, 4, (1, 0))
    assert {frozenset(b) for b in batches} != {frozenset(b) for b in epoch_batches(lengths, 4, (1, 1))}
    waste = sum(max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches)
    unsorted = sum(max(lengths[i:i + 4]) * 4 - sum(lengths[i:i + 4]) for i in range(0, 101, 4))
    assert waste < unsorted / 2


@pytest.mark.parametrize("cls", [LanguageModel, ScalarModel])
def test_recomputed_activations_give_the_same_gradient(cls):
    """With recompute a block runs a second time in the backward pass, and the gradient stays what it is, bit for bit."""
    model = cls(ModelConfig(n_layer=3, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, block_size=16, vocab_size=11))
    tokens, calls, found = torch.arange(20).view(2, 10) % 11, [], []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.model.recompute in (False, True):
        found.append(torch.autograd.grad(model(tokens).float().sin().sum(), list(model.parameters())))
        calls.append("|")
    assert calls == [1, "|", 1, 1, "|"]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("rates, expected", [((3.0, 1.0), torch.bfloat16), ((1.2, 1.0), torch.float32),
                                             ((0.5, 1.0), torch.float32)])
def test_dtype_is_chosen_by_measurement(monkeypatch, rates, expected):
    """On a CPU bfloat16 is used where its products are clearly faster, and the ratio is told; what is asked for wins."""
    monkeypatch.setattr(model_module, "matrix_rate", lambda device, dtype: rates[dtype == torch.float32])
    dtype, why = choose_dtype(torch.device("cpu"), "auto")
    assert dtype == expected and f"{rates[0]:.1f} times" in why
    assert choose_dtype(torch.device("cpu"), "bfloat16")[0] == torch.bfloat16
    assert torch.get_num_threads() == THREADS


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

@pytest.mark.parametrize("shape", [(1, 24, 24), (1, 40, 16), (1, 16, 40), (3, 12, 20)])
def test_newton_schulz_flattens_singular_values(shape):
    """Orthogonalisation brings singular values near 1 and keeps the singular vectors, for wide, tall and stacked."""
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = torch.linspace(1, 0.03, s.shape[-1], dtype=torch.float64).expand_as(s)
    x = newton_schulz(u * s[..., None, :] @ vt)
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6 and values.max() < 1.3
    inner = u.mT @ x @ vt.mT
    torch.testing.assert_close(inner, torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-9)


def test_muon_agrees_with_pytorchs():
    """Muon moves matrices as torch.optim.Muon does over several steps: direction, length, momentum, decay."""
    torch.manual_seed(0)
    shapes = [(16, 16), (32, 16), (16, 32), (32, 16)]
    ours = [nn.Parameter(torch.randn(s)) for s in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=0.05, momentum=0.9, weight_decay=0.3)
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)  # adjust_lr_fn: "original" by default
    for _ in range(6):
        before = [[p.detach().clone() for p in params] for params in (ours, theirs)]
        for p, q in zip(ours, theirs):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q, old_p, old_q in zip(ours, theirs, *before):
            a, b = (p - old_p).flatten(), (q - old_q).flatten()
            assert F.cosine_similarity(a, b, dim=0) > 0.99
            assert 0.98 < a.norm() / b.norm() < 1.02


def test_muon_steps_by_its_formula():
    """p ← (1 - ηλ) p - η √max(1, rows/columns) NS(μ m + (1 - μ) g) with m = Σ (1 - μ) μ^age g, step by step."""
    torch.manual_seed(0)
    for shape in (8, 12), (12, 8):
        p, seen = nn.Parameter(torch.randn(shape, dtype=torch.float64)), []
        optimizer = Muon([p], lr=0.05, momentum=0.9, weight_decay=0.3)
        for _ in range(4):
            p.grad, old = torch.randn_like(p), p.detach().clone()
            seen.append(p.grad.clone())
            optimizer.step()
            momentum = sum(0.1 * 0.9 ** age * g for age, g in enumerate(reversed(seen)))
            update = newton_schulz((0.9 * momentum + 0.1 * seen[-1])[None])[0]
            expected = old * (1 - 0.05 * 0.3) - 0.05 * max(1, shape[0] / shape[1]) ** 0.5 * update
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tie", [True, False])
def test_optimizers_split_the_parameters(tie):
    """Each parameter is in exactly one optimizer; Muon has the blocks' matrices; norms are not decayed."""
    for model in (LanguageModel(tiny(tie=tie)), ScalarModel(tiny())):
        both = Optimizers(model, 1e-3, 0.02, weight_decay=0.1)
        adam, muon = ([p for g in o.param_groups for p in g["params"]] for o in both.all)
        assert sorted(map(id, adam + muon)) == sorted(map(id, model.parameters()))
        assert {id(p) for p in muon} == {id(p) for n, p in model.named_parameters() if ".layers." in n and "proj" in n}
        assert all(g["weight_decay"] == (0.1 if p.dim() == 2 else 0) for o in both.all for g in o.param_groups
                   for p in g["params"])
        alone = Optimizers(model, 1e-3)
        assert len(alone.all) == 1
        params = [p for g in alone.all[0].param_groups for p in g["params"]]
        assert sorted(map(id, params)) == sorted(map(id, model.parameters()))


def test_optimizers_step_scales_every_rate():
    """step(factor) takes factor times the *peak* rates, whatever was set before, and forgets the gradients."""
    model = language_model()
    optimizer = Optimizers(model, 1e-3, 0.02)
    for factor in (0.5, 1.0, 0.25):
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step(factor)
        assert [g["lr"] for o in optimizer.all for g in o.param_groups] == [1e-3 * factor] * 2 + [0.02 * factor]
        assert all(p.grad is None for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step(0.0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))


def test_adam_has_the_betas_it_is_given():
    """AdamW's two moments decay at two rates (catches betas = (b1, b1)): three steps against the formula by hand."""
    layer = nn.Module()
    layer.w = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Optimizers(layer, 0.1, betas=(0.8, 0.9), eps=1e-5)
    m = v = x = 0.0
    for t, g in enumerate((1.0, -3.0, 0.5), 1):
        layer.w.grad = torch.full((2, 2), g, dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x -= 0.1 * (m / (1 - 0.8 ** t)) / (math.sqrt(v / (1 - 0.9 ** t)) + 1e-5)
        torch.testing.assert_close(layer.w.detach(), torch.full((2, 2), x, dtype=torch.float64), rtol=0, atol=1e-9)


def test_learning_rate_factor():
    """Linear up over the warm-up, 1 at its end, linear down to 0."""
    assert [learning_rate_factor(s, 100, 10) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate_factor(55, 100, 10) == pytest.approx(0.5)
    assert learning_rate_factor(99, 100, 10) == pytest.approx(1 / 90)
    assert learning_rate_factor(100, 100, 10) == pytest.approx(0)
    assert learning_rate_factor(0, 40) == 1 and learning_rate_factor(30, 40) == pytest.approx(0.25)
    assert learning_rate_factor(3, 4, 10) == pytest.approx(0.4)


# ---------------------------------------------------------------------------------------------------------------------
# Running a stage

def test_token_weighted_mean_over_micro_batches(tmp_path):
    """Targets (1, 3) with losses (2; 1, 1, 1): the accumulated loss is 1.25; a mean of means would say 1.5."""
    run, losses = a_run(tmp_path), torch.tensor([[2.0, 0, 0], [1, 1, 1]])
    model = RMSNorm(1)
    total = run.backward(model, 2, 1, lambda rows: (model.weight * losses[rows]).sum() / 4)
    assert total == 1.25 and model.weight.grad == 1.25


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 5])
def test_accumulation_equals_one_big_batch(tmp_path, micro_batch_size, threads):
    """Gradients summed over micro-batches, even and uneven, in one thread or in several, equal those of the whole batch
    in float64."""
    run, model = a_run(tmp_path), language_model().double()
    run.threads = threads
    tokens, targets = torch.randint(19, (5, 6)), torch.randint(19, (5, 6))
    for row, n in enumerate((1, 6, 3, 2, 5)):
        targets[row, n:] = IGNORE
    n_targets = (targets != IGNORE).sum()

    def loss_of(rows):
        return F.cross_entropy(model(tokens[rows]).flatten(0, 1), targets[rows].flatten(), reduction="sum") / n_targets

    total = run.backward(model, 5, micro_batch_size, loss_of)
    found = [p.grad for p in model.parameters()]
    whole = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert total == pytest.approx(whole.item(), abs=1e-12)
    for g, e in zip(found, torch.autograd.grad(whole, list(model.parameters()))):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_several_models_share_a_backward_pass(tmp_path, threads):
    """Gradients and figures of several losses at once, two of them of one model, are those of each by itself."""
    run, tokens = a_run(tmp_path), torch.randint(19, (5, 6))
    run.threads, first, second = threads, language_model().double(), language_model(1).double()
    pairs = [(first, lambda rows: first(tokens[rows]).square().sum() / 5),
             (second, lambda rows: second(tokens[rows]).sin().sum((0, 1))[:2]),
             (first, lambda rows: first(tokens[rows]).cos().sum() / 5)]
    totals = run.backward_all(5, 2, *pairs)
    found = [p.grad for model in (first, second) for p in model.parameters()]
    everything = [loss_of(slice(0, 5)) for _, loss_of in pairs]
    assert totals == [pytest.approx(figures.tolist()) for figures in everything]
    expected = [*torch.autograd.grad(everything[0] + everything[2], list(first.parameters())),
                *torch.autograd.grad(everything[1][0], list(second.parameters()))]
    for g, e in zip(found, expected):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-12)


def test_processes_share_a_batch_exactly(tmp_path):
    """The shares of all processes are the whole batch, in order, whatever their number."""
    run = a_run(tmp_path)
    for run.world in (1, 2, 3, 8):
        for n in (1, 5, 16):
            shares = []
            for run.rank in range(run.world):
                shares += run.share(n)
            assert shares == list(range(n))


def test_update_clips_after_backward(tmp_path):
    """The step uses clipped gradients (catches clipping before backward); a loss that is not finite stops the run."""
    run, layer = a_run(tmp_path), nn.Linear(1, 2, bias=False)

    class Plain:
        def step(self, factor):
            self.seen = layer.weight.grad.clone()

    config, optimizer = type("config", (), dict(gradient_clip=1.0)), Plain()
    run.backward(layer, 1, 1, lambda rows: (layer(torch.ones(1, 1)) * torch.tensor([3.0, 4.0])).sum())
    assert run.update(layer, optimizer, 0.0, 1, config, 1.0) == pytest.approx(5)
    torch.testing.assert_close(optimizer.seen, torch.tensor([[0.6], [0.8]]))
    one_line(lambda: run.update(layer, optimizer, math.nan, 7, config, 1.0), "step 7", "nan")


@dataclass
class StageConfig(ModelConfig, RunConfig):
    table = "sft"
    rate: float = option(1e-3, "a rate", low=0)
    share: float = option(0.1, "a share", low=0, high=1)
    resume: bool = option(False, "go on")


def load(*argv):
    return load_config(StageConfig, "A stage.", list(argv))


def config_file(tmp_path, text):
    path = tmp_path / "some.toml"
    path.write_text(text)
    return f"--config={path}"


def test_config_precedence(tmp_path):
    """Defaults, then the file's tables that concern the stage, then the command line; each value has its type."""
    assert load() == StageConfig()
    file = config_file(tmp_path, 'seed = 5\nout_dir = "o"\n[model]\nn_embd = 64\n[sft]\nrate = 1\nresume = true\n'
                                 '[ppo]\nx = 1')
    config = load(file)
    assert (config.seed, config.out_dir, config.n_embd, config.rate, config.resume) == (5, "o", 64, 1.0, True)
    assert type(config.rate) is float and config.n_layer == StageConfig().n_layer
    config = load("--n_embd", "32", file, "--rate=2e-4", "--resume=false", "--seed=6")
    assert (config.seed, config.n_embd, config.rate, config.resume) == (6, 32, 2e-4, False)
    assert load("--resume").resume is True


def test_help_lists_every_option(capsys):
    """--help names every option with its default and ends well."""
    with pytest.raises(SystemExit) as caught:
        load("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert "A stage." in shown and "--vocab_size" not in shown
    for name in ("n_layer", "n_head", "rope_theta", "out_dir", "seed", "dtype", "rate", "share", "resume"):
        assert f"--{name}={getattr(StageConfig(), name)!r}" in shown


@pytest.mark.parametrize("argv,words", [
    (["--n_layers=3"], ["--n_layers", "did you mean n_layer?"]),
    (["rate=3"], ["rate=3"]),
    (["--n_layer=three"], ["n_layer", "int", "three"]),
    (["--n_layer=2.5"], ["n_layer", "int"]),
    (["--rate=nan"], ["rate", "float"]),
    (["--resume=maybe"], ["resume", "true or false"]),
    (["--n_layer=0"], ["n_layer", "at least 1"]),
    (["--share=1.5"], ["share", "between 0 and 1"]),
    (["--device=tpu"], ["device", "cuda"]),
    (["--rate"], ["--rate", "value"]),
    (["--n_embd=130"], ["n_head=4", "n_embd=130"]),
    (["--n_kv_head=3"], ["n_kv_head=3", "n_head=4"]),
    (["--config=no/such.toml"], ["no/such.toml"]),
])
def test_config_mistakes_on_the_command_line(argv, words):
    """A mistaken option ends the program in one line that names it."""
    one_line(lambda: load(*argv), *words)


@pytest.mark.parametrize("text,words", [
    ("sede = 3", ["sede", "top level", "did you mean seed?"]),
    ("rate = 3", ["rate", "top level"]),
    ("[sft]\nrates = 3", ["rates", "[sft]", "did you mean rate?"]),
    ("[sff]\nrate = 3", ["sff", "did you mean sft?"]),
    ("[model]\nn_layer = 'four'", ["n_layer"]),
    ("[model]\nn_layer = true", ["n_layer", "int"]),
    ("[sft]\nshare = -1", ["share", "between 0 and 1"]),
    ("[sft\nrate = 3", ["cannot read"]),
    ("[sft]\nrate = 1" + 400 * "0", ["rate", "float"]),
    ("seed = 1" + 5000 * "0", ["cannot read"]),
    ("seed = " + 5000 * "[", ["cannot read"]),
    ("sft = 3", ["sft"]),
    ("[[sft]]\nrate = 3", ["sft"]),
])
def test_config_mistakes_in_the_file(tmp_path, text, words):
    """A mistake in the file ends the program in one line that names the file and the key."""
    one_line(lambda: load(config_file(tmp_path, text)), "some.toml", *words)


def save_checkpoint(tmp_path, name="a.pt"):
    run, model = a_run(tmp_path), language_model()
    optimizer = Optimizers(model, 1e-3, 0.02)
    model(torch.tensor([[1, 2, 3]])).square().sum().backward()
    optimizer.step()
    run.start(SimpleNamespace(hash="abc"), "nothing", model=model, optimizer=optimizer)
    run.save(name, 7)
    return run, model, optimizer


def test_checkpoint_round_trip(tmp_path):
    """A saved checkpoint gives back weights, optimizer, random numbers and shape, bit for bit; the next step too."""
    run, model, optimizer = save_checkpoint(tmp_path, "test.last.pt")
    expected = torch.rand(3)
    checkpoint = load_checkpoint(run.path("test.last.pt"), "python sft.py", "abc")
    assert checkpoint["step"] == 7 and checkpoint["model_config"] == model.model.config
    assert all(t.dtype == torch.float32 for t in checkpoint["model"].values())
    again = LanguageModel(checkpoint["model_config"])
    optimizer_again = Optimizers(again, 1e-3, 0.02)
    run.stage, run.config.resume = "test", True
    tokenizer = SimpleNamespace(hash="abc")
    assert run.start(tokenizer, "nothing", model=again, optimizer=optimizer_again)["step"] == 7
    assert torch.equal(torch.rand(3), expected)
    for m, o in ((model, optimizer), (again, optimizer_again)):
        m(torch.tensor([[4, 5, 6]])).square().sum().backward()
        o.step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert not list(tmp_path.glob("*.tmp"))


def test_damaged_checkpoints_are_named(tmp_path):
    """A missing, truncated or foreign file ends the program in one line that names it and the command to run."""
    run, _, _ = save_checkpoint(tmp_path)
    path = tmp_path / "a.pt"
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], whole[:10], b"", b"not a checkpoint at all"):
        path.write_bytes(content)
        one_line(lambda: load_checkpoint(str(path), "python sft.py"), "a.pt", "python sft.py")
    one_line(lambda: load_checkpoint(run.path("b.pt"), "python sft.py"), "b.pt", "python sft.py")
    torch.save([1, 2], path)
    one_line(lambda: load_checkpoint(str(path), "python sft.py"), "a.pt")


class Payload:
    """Unpickled, it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_checkpoint_executes_nothing(tmp_path):
    """A checkpoint that hides a pickle of code runs none of it and ends the program in one line."""
    path, evil = str(tmp_path / "a.pt"), tmp_path / "evil"
    for content in (Payload(str(evil)), dict(model_config=asdict(tiny()), model=Payload(str(evil)), tokenizer="abc")):
        torch.save(content, path)
        one_line(lambda: load_checkpoint(path, "python sft.py"), "a.pt")
        assert not evil.exists()
    torch.load(path, weights_only=False)["model"].close()
    assert evil.exists()  # the payload is a real one


def test_checkpoint_of_another_tokenizer_is_refused(tmp_path):
    """Weights are not used with a tokenizer that they were not trained with."""
    run, _, _ = save_checkpoint(tmp_path)
    one_line(lambda: load_checkpoint(run.path("a.pt"), "python sft.py", "xyz"), "a.pt", "tokenizer")


def test_earlier_files_are_never_overwritten(tmp_path):
    """An earlier file takes the next free number, so that all of them stay."""
    run, path = a_run(tmp_path), tmp_path / "a.pt"
    for i in range(4):
        path.write_text(str(i))
        run.keep_earlier("a.pt", "none.pt")
        assert not path.exists()
    assert [(tmp_path / f"a.{i + 1}.pt").read_text() for i in range(4)] == ["0", "1", "2", "3"]


def test_publish_keeps_what_differs(tmp_path):
    """A new file replaces an equal one silently; a different one is kept under another name."""
    run = a_run(tmp_path)
    for text in ("one", "one", "two"):
        (tmp_path / "a.txt.tmp").write_text(text)
        run.publish("a.txt")
    assert (tmp_path / "a.txt").read_text() == "two" and (tmp_path / "a.1.txt").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.1.txt", "a.txt"]


def test_uniforms_depend_on_seed_and_key_alone(tmp_path):
    """Random numbers are the same in every process and at every call, and others for another key or seed."""
    run, other = a_run(tmp_path), a_run(tmp_path, seed=2)
    first = run.uniforms(3, 4, 5, 0)
    torch.rand(7)
    assert torch.equal(first, run.uniforms(3, 4, 5, 0)) and first.min() >= 0 and first.max() < 1
    assert not torch.equal(first, run.uniforms(3, 4, 5, 1)) and not torch.equal(first, other.uniforms(3, 4, 5, 0))
