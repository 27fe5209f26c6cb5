"""The Transformer against independent references, and generation, batches and the optimizer."""

import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model as model_module
from chain import one_line
from helpers import close, float64
from model import (IGNORE, LanguageModel, ModelConfig, Muon, Optimizer, ScalarModel, Transformer,
                   choose_dtype, clip_gradients, draw, generate, generate_tokens,
                   learning_rate_factor, newton_schulz, next_token_probabilities, pad)
from prepare import epoch_batches, random_stream
from pretrain import flops_per_token, get_batch

STOP = 0


def small_config(**shape):
    defaults = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, block_size=24,
                    vocab_size=19)
    return ModelConfig(**defaults | shape)


def language_model(seed=0, scale=4.0, **shape):
    """A small model with weights large enough for logits, norms and attention to matter."""
    torch.manual_seed(seed)
    model = LanguageModel(small_config(**shape)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p) + 0.5 if p.dim() == 1 else p * scale)
    return model


# --------------------------------------------------------------------------------------------------
# The Transformer

def reference_qwen3(weights, config, row):
    """Qwen3's forward pass for one row of ids, in numpy and float64, head by head and position by
    position, with rotations as products of complex numbers."""
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}
    D, T, group = config.head_dim, len(row), config.n_head // config.n_kv_head

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
            shared = slice(j // group * D, (j // group + 1) * D)
            qj = turn(norm(q[:, j * D:(j + 1) * D], w[at + "self_attn.q_norm.weight"]))
            kj = turn(norm(k[:, shared], w[at + "self_attn.k_norm.weight"]))
            out = np.zeros((T, D))
            for t in range(T):
                weight = np.array([math.exp(qj[t] @ kj[s] / math.sqrt(D)) for s in range(t + 1)])
                out[t] = weight @ v[:t + 1, shared] / weight.sum()
            heads.append(out)
        x = x + np.concatenate(heads, axis=1) @ w[at + "self_attn.o_proj.weight"].T
        h = norm(x, w[at + "post_attention_layernorm.weight"])
        gate, up = h @ w[at + "mlp.gate_proj.weight"].T, h @ w[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[at + "mlp.down_proj.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def exact_angles(config, positions):
    D = config.head_dim
    frequency = [config.rope_theta ** (-2 * (i % (D // 2)) / D) for i in range(D)]
    return np.outer(np.arange(positions), frequency)


@pytest.mark.parametrize("shape", [
    dict(n_kv_head=1), dict(n_kv_head=2), dict(n_kv_head=4), dict(tie_embeddings=False),
    dict(head_dim=12), dict(n_head=3, n_kv_head=1, head_dim=6, tie_embeddings=False)])
def test_logits_equal_an_independent_qwen3(shape):
    """The forward pass is Qwen3's: in float64 its logits equal a reference written head by head."""
    model = language_model(rope_theta=500.0, **shape).double()
    config, trunk = model.model.config, model.model
    angle = exact_angles(config, len(trunk.cos))
    trunk.cos.copy_(torch.from_numpy(np.cos(angle)))  # the tables are rounded to float32; here all
    trunk.sin.copy_(torch.from_numpy(np.sin(angle)))  # else is compared to 1e-9
    tokens = torch.randint(config.vocab_size, (2, 11))
    with torch.no_grad():
        logits = model(tokens).numpy()
    weights = model.state_dict()
    expected = np.stack([reference_qwen3(weights, config, row.tolist()) for row in tokens])
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-9)


TABLE = """
import math, model
trunk = model.Transformer(model.ModelConfig(n_layer=1, vocab_size=9, block_size=256))
found = trunk.cos.tolist()
exact = [[math.cos(t * 1e4 ** (-2 * (i % 16) / 32)) for i in range(32)] for t in range(len(found))]
print(max(abs(a - b) for row, exact_row in zip(found, exact) for a, b in zip(row, exact_row)))
"""


def test_rotary_table_is_exact():
    """Cosines and sines are exact but for their rounding to float32, for long contexts, too."""
    config = small_config(block_size=5000, rope_theta=1e6)
    trunk = Transformer(config)
    angle = exact_angles(trunk.config, len(trunk.cos))
    assert np.abs(trunk.cos.double().numpy() - np.cos(angle)).max() < 6e-8
    assert np.abs(trunk.sin.double().numpy() - np.sin(angle)).max() < 6e-8


def test_rotary_table_is_exact_in_a_new_process():
    """So they are where nothing else has been computed yet."""
    done = subprocess.run([sys.executable, "-c", TABLE], cwd=Path(__file__).parents[1], text=True,
                          check=True, stdout=subprocess.PIPE)
    assert float(done.stdout) < 6e-8


def test_rotate_by_hand():
    """The channels (0, 2) and (1, 3) are pairs: the first is turned by 90 degrees, the second stays
    (catches a turn in the other direction, and pairs of neighbours). A query and a key that move
    on together keep their product."""
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 1, 4)
    turn, stay = torch.tensor([[0.0, 1, 0, 1]]), torch.tensor([[1.0, 0, 1, 0]])
    close(model_module.rotate(x, turn, stay).flatten(), torch.tensor([-3.0, 2, 1, 4]))
    q, k = torch.randn(2, 1, 1, 1, 8)
    angle = torch.outer(torch.tensor([3.0, 5, 10, 12]), torch.tensor([1.0, 0.5, 0.1, 0.01]))
    angle = angle.tile(2)[:, None]                                     # (4, 1, 8): four positions
    q, k = ([model_module.rotate(z, a.cos(), a.sin()).flatten() for a in angle] for z in (q, k))
    close(q[1] @ k[0], q[3] @ k[2], 1e-5)
    assert abs(q[1] @ k[0] - q[3] @ k[0]) > 1e-3


def test_rms_norm_by_hand():
    """(3, 4) has a root mean square of √12.5; gains come after it. Nothing is shifted, and zeros
    stay zeros; the dtype is that of x."""
    norm = model_module.RMSNorm(2)
    norm.weight.data = torch.tensor([1.0, 2.0])
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    close(norm(x).detach(), torch.tensor([[3.0, 8.0], [0.0, 0.0]]) / 12.5**0.5, 1e-6)
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and norm(x).dtype == torch.float32


def test_attention_by_hand():
    """Weights of 1/4 and 3/4 from a score of log 3 times √D; without a mask each token sees itself
    and those before it; query heads that follow each other share a key head; a mask hides keys."""
    q = torch.zeros(1, 1, 3, 4)
    k, v = torch.zeros(1, 1, 3, 4), torch.tensor([0.0, 4.0, 8.0]).view(1, 1, 3, 1)
    v = v.expand(1, 1, 3, 4)

    def found(*arguments):
        return model_module.attention(*arguments)[0, :, :, 0]

    close(found(q, k, v), torch.tensor([[0.0, 2.0, 4.0]]), 1e-5)
    q[..., 0], k[0, 0, 1, 0] = 1.0, 2 * math.log(3)
    close(found(q, k, v), torch.tensor([[0.0, 3.0, 4.0]]), 1e-5)
    last = torch.tensor([False, False, True]).expand(1, 1, 3, 3)
    close(found(q, k, v, last), torch.tensor([[8.0, 8.0, 8.0]]), 1e-5)
    q, k, v = q.expand(1, 4, 3, 4), k.expand(1, 2, 3, 4), torch.cat([v, -v], 1)
    close(found(q, k, v)[:, 1], torch.tensor([3.0, 3.0, -3.0, -3.0]), 1e-5)


@pytest.mark.parametrize("tie", [True, False])
def test_state_dict_is_named_like_hugging_faces(tie):
    """The names and shapes of the state dict are those of Qwen3ForCausalLM, no more and no
    fewer."""
    model = LanguageModel(small_config(n_kv_head=1, head_dim=6, tie_embeddings=tie))
    expected = {"model.embed_tokens.weight": (19, 32), "model.norm.weight": (32,),
                "lm_head.weight": (19, 32)}
    for n in range(2):
        at = f"model.layers.{n}."
        shapes = {
            "input_layernorm": (32,), "post_attention_layernorm": (32,),
            "self_attn.q_proj": (24, 32), "self_attn.k_proj": (6, 32), "self_attn.v_proj": (6, 32),
            "self_attn.o_proj": (32, 24), "self_attn.q_norm": (6,), "self_attn.k_norm": (6,),
            "mlp.gate_proj": (48, 32), "mlp.up_proj": (48, 32), "mlp.down_proj": (32, 48)}
        expected |= {f"{at}{name}.weight": shape for name, shape in shapes.items()}
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


@pytest.mark.parametrize("shape", [dict(), dict(n_kv_head=4, head_dim=12, tie_embeddings=False)])
def test_logits_equal_hugging_faces(shape):
    """Qwen3ForCausalLM loads our weights, strictly, and says what our model says, also word by
    word."""
    transformers = pytest.importorskip("transformers")
    model = language_model(rope_theta=500.0, **shape)
    c = model.model.config
    theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head, head_dim=c.head_dim,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=c.rope_theta),
        tie_word_embeddings=c.tie_embeddings, bos_token_id=1, eos_token_id=STOP, pad_token_id=STOP))
    theirs.load_state_dict(model.state_dict(), strict=True)
    tokens = torch.randint(1, c.vocab_size, (2, 13))
    with torch.no_grad():
        logits = model(tokens)
        close(theirs.eval()(tokens).logits, logits, 1e-4)
        said = theirs.generate(tokens[:1, :5], max_new_tokens=12, do_sample=False)
    assert logits.abs().max() > 0.5
    greedy, = generate(model, [tokens[0, :5].tolist()], 12, STOP, torch.zeros(1, 12), temperature=0)
    assert said[0, 5:].tolist() == greedy


@pytest.mark.parametrize("shape, words", [
    (dict(n_head=4, n_kv_head=3), ("n_kv_head=3", "n_head=4")),
    (dict(n_head=4, n_embd=130), ("n_head=4", "n_embd=130")),
    (dict(n_head=32, n_embd=32), ("n_head=32", "even")), (dict(head_dim=7), ("head_dim", "even"))])
def test_impossible_shapes_are_named(shape, words):
    """A shape that no Transformer can have is described in a line; possible ones are not."""
    assert all(word in small_config(**shape).check() for word in words)
    assert small_config().check() is None and small_config(n_embd=130, head_dim=8).check() is None


def test_padding_on_the_right_changes_nothing():
    """A row alone has the hidden states that it has in a padded batch, whatever the padding is."""
    model = language_model().double()
    rows = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [2]]
    with torch.no_grad():
        for value in (0, 7):
            for row, hidden in zip(rows, model.model(pad(rows, value))):
                close(hidden[:len(row)], model.model(torch.tensor([row]))[0], 1e-12)


def test_no_token_sees_a_later_one():
    """Another token changes the hidden states from its place on, and none before it."""
    model, tokens = language_model().double(), torch.arange(1, 13)[None]
    other = tokens.clone()
    other[0, 7] = 15
    with torch.no_grad():
        a, b = model.model(tokens)[0], model.model(other)[0]
    assert torch.equal(a[:7], b[:7]) and (a[7:] != b[7:]).any(1).all()


def test_bfloat16_agrees_with_float32():
    """Under autocast products are in bfloat16, and logits are right to its rounding; losses are in
    float32, as differences of large logits need it."""
    model, tokens = language_model(tie_embeddings=False), torch.randint(19, (4, 12))
    with torch.no_grad():
        logits, loss = model(tokens), model(tokens, tokens.roll(-1, 1))
        with torch.autocast("cpu", torch.bfloat16):
            rough, rough_loss = model(tokens), model(tokens, tokens.roll(-1, 1))
            rough_value = ScalarModel(small_config())(tokens)
    assert rough.dtype == torch.bfloat16 and (rough - logits).norm() < 0.02 * logits.norm()
    assert rough_loss.dtype == rough_value.dtype == torch.float32 and (rough != logits).any()
    close(rough_loss, loss, 0.1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_is_cross_entropy_of_the_targets(temperature):
    """With targets the model returns -log p of each at the temperature, 0 where one is IGNORE, and
    the gradient in all weights is that of PyTorch's cross-entropy."""
    with float64():
        model = language_model(tie_embeddings=False)
        tokens, targets = torch.randint(19, (3, 6)), torch.randint(19, (3, 6))
        targets[0, 2:], targets[2] = IGNORE, IGNORE
        loss = model(tokens, targets, temperature)
        log_p = (model(tokens) / temperature).log_softmax(-1)
        by_hand = torch.zeros(3, 6)
        for b in range(3):
            for t in range(6):
                if targets[b, t] != IGNORE:
                    by_hand[b, t] = -log_p[b, t, targets[b, t]]
        close(loss, by_hand)
        assert (loss[targets == IGNORE] == 0).all() and (loss[targets != IGNORE] > 0).all()
        whole = F.cross_entropy((model(tokens) / temperature).flatten(0, 1), targets.flatten(),
                                reduction="sum")
        weights = list(model.parameters())
        for found, expected in zip(torch.autograd.grad(loss.sum(), weights),
                                   torch.autograd.grad(whole, weights)):
            close(found, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_of_even_odds(temperature):
    """A model that holds all 19 words for equally likely loses log 19 at each target, whatever the
    temperature, and 0 where there is none; without targets it gives logits."""
    model = language_model(tie_embeddings=False)
    model.lm_head.weight.data.zero_()
    tokens = torch.arange(8).view(2, 4)
    targets = torch.tensor([[1, IGNORE, 3, 0], [IGNORE] * 4])
    expected = torch.tensor([[1.0, 0, 1, 1], [0] * 4]) * math.log(19)
    close(model(tokens, targets, temperature).detach(), expected, 1e-5)
    assert model(tokens).shape == (2, 4, 19)


def test_loss_without_any_target():
    """Rows that are all prompt have no loss and a gradient of 0, not one that is undefined."""
    model, tokens = language_model(), torch.randint(19, (2, 5))
    loss = model(tokens, torch.full((2, 5), IGNORE))
    assert torch.equal(loss, torch.zeros(2, 5))
    loss.sum().backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


def test_dense_equals_the_masked_path():
    """dense=True, for pretraining, gives the loss and gradients of the path that selects
    targets."""
    with float64():
        model = language_model()
        tokens, targets = torch.randint(19, (3, 7)), torch.randint(19, (3, 7))
        masked, dense = model(tokens, targets), model(tokens, targets, dense=True)
        close(dense, masked, 1e-12)
        weights, importance = list(model.parameters()), torch.rand(3, 7)
        for found, expected in zip(torch.autograd.grad((dense * importance).sum(), weights),
                                   torch.autograd.grad((masked * importance).sum(), weights)):
            close(found, expected, 1e-12)


@pytest.mark.parametrize("recompute", [False, True])
def test_pretraining_is_one_graph(recompute):
    """What pretrain.py --compile compiles is a single graph, which a second batch uses again, and
    its loss and gradients are those of the model that is not compiled."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = language_model()
    model.model.recompute = recompute
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=backend)
    for seed in range(2):
        torch.manual_seed(seed)
        tokens, targets = torch.randint(19, (3, 8)), torch.randint(19, (3, 8))
        found, expected = compiled(tokens, targets, dense=True), model(tokens, targets, dense=True)
        close(found, expected, 1e-6)
        weights = list(model.parameters())
        for a, b in zip(torch.autograd.grad(found.sum(), weights),
                        torch.autograd.grad(expected.sum(), weights)):
            close(a, b, 1e-4)
    assert len(graphs) == 1


def test_scalar_model_stands_on_the_same_trunk():
    """With a language model's weights a scalar model has its hidden states (catches a final norm
    that is applied twice), and a shallower one those of its lower layers; only the head is
    missing."""
    lm = language_model()
    same, lower = ScalarModel(small_config()), ScalarModel(small_config(n_layer=1))
    for model in (same, lower):
        loaded = model.load_state_dict(lm.state_dict(), strict=False)
        assert loaded.missing_keys == ["score.weight", "score.bias"]
    tokens = torch.randint(19, (2, 5))
    with torch.no_grad():
        assert torch.equal(same.model(tokens), lm.model(tokens))
        values = same.model(tokens) @ same.score.weight[0] + same.score.bias
        close(same(tokens), values, 1e-6)
        close(same(tokens, torch.tensor([5, 2])), torch.stack([values[0, 4], values[1, 1]]), 1e-6)
        cos, sin = lm.model.cos[:5], lm.model.sin[:5]
        first = lm.model.norm(lm.model.layers[0](lm.model.embed_tokens(tokens), cos, sin))
        assert torch.equal(lower.model(tokens), first)


@pytest.mark.parametrize("cls", [LanguageModel, ScalarModel])
def test_recomputed_activations_give_the_same_gradient(cls):
    """With recompute a block runs a second time in the backward pass, and the gradient stays what
    it is, bit for bit."""
    torch.manual_seed(0)
    model = cls(ModelConfig(n_layer=3, n_head=2, n_kv_head=1, n_embd=16, n_inner=24, block_size=16,
                            vocab_size=11))
    tokens, calls, found = torch.arange(20).view(2, 10) % 11, [], []
    model.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.model.recompute in (False, True):
        loss = model(tokens).float().sin().sum()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
        calls.append("|")
    assert calls == [1, "|", 1, 1, "|"]
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("ratio, expected", [(3.0, torch.bfloat16), (1.2, torch.float32),
                                             (0.5, torch.float32)])
def test_dtype_is_chosen_by_measurement(monkeypatch, ratio, expected):
    """On a CPU bfloat16 is used where its products are clearly faster, and the ratio is told; what
    is asked for wins."""
    rates = {torch.bfloat16: ratio * 7e9, torch.float32: 7e9}
    monkeypatch.setattr(model_module, "matrix_rate", lambda device, dtype: rates[dtype])
    dtype, why = choose_dtype(torch.device("cpu"), "auto")
    assert dtype == expected and f"{ratio:.1f} " in why
    for name in ("bfloat16", "float32"):
        assert choose_dtype(torch.device("cpu"), name) == (getattr(torch, name), "as asked")


# --------------------------------------------------------------------------------------------------
# Generation

PROMPTS = [[5, 6, 7], [1], [2, 3, 4, 5, 6, 7, 8], [9, 9], [11, 12, 13, 14]]
SAMPLERS = [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.8), (0.9, 6, 0.7), (0, 0, 1.0)]


def uniforms(rows, width, seed=0):
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))


def sampling_model(scale=4.0, **shape):
    """A model that is unsure of the next token, so that rows differ and end at different times."""
    model = language_model(scale=scale, tie_embeddings=False, **shape)
    with torch.no_grad():
        model.lm_head.weight[STOP] *= 1.5
    return model


@pytest.fixture
def drawn(monkeypatch):
    """What `generate` has drawn from: (probabilities, random numbers) of each step."""
    steps = []

    def draw_and_tell(probs, uniform):
        steps.append((probs, uniform))
        return draw(probs, uniform)

    monkeypatch.setattr(model_module, "draw", draw_and_tell)
    return steps


def check_teacher_forced(model, prompts, responses, u, drawn, *sampler):
    """Each token was drawn from the distribution that one pass over the whole text gives, without a
    cache and without neighbours. The random numbers tell which row of the batch is whose."""
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + response[:-1]]))[0, len(prompt) - 1:]
        expected = next_token_probabilities(logits, *sampler)                          # (T, V)
        for step, token in enumerate(response):
            probs, numbers = drawn[step]
            found = probs[numbers == u[row, step]]
            assert len(found) == 1
            close(found[0], expected[step], 1e-5)
            assert token == draw(found, u[row, step:step + 1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_generation_is_teacher_forcing(drawn, sampler):
    """With the cache every token is drawn from the distribution that one pass over the whole text
    gives, for every sampler (catches another temperature or top-k in sampling than in scoring)."""
    model, u = sampling_model(), uniforms(5, 12)
    responses = generate(model, PROMPTS, 12, STOP, u, *sampler)
    if sampler[0]:
        assert len({len(r) for r in responses}) > 2
    check_teacher_forced(model, PROMPTS, responses, u, drawn, *sampler)


def test_a_row_alone_is_the_row_in_a_batch():
    """A row's text depends on its own prompt and random numbers alone, and the same numbers give
    the same text."""
    model, u = sampling_model(), uniforms(5, 12)
    together = generate(model, PROMPTS, 12, STOP, u)
    assert together == generate(model, PROMPTS, 12, STOP, u)
    assert together != generate(model, PROMPTS, 12, STOP, uniforms(5, 12, seed=1))
    assert generate(model, PROMPTS[::-1], 12, STOP, u.flip(0)) == together[::-1]
    for i, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], 12, STOP, u[i:i + 1]) == [together[i]]


def test_temperature_0_is_greedy():
    """Temperature 0 takes the likeliest token each time, and temperature 1 does not (catches
    rollouts that are greedy by accident)."""
    model = sampling_model()
    responses = generate(model, PROMPTS, 8, STOP, uniforms(5, 8), temperature=0)
    for prompt, response in zip(PROMPTS, responses):
        text = list(prompt)
        for token in response:
            with torch.no_grad():
                assert token == model(torch.tensor([text]))[0, -1].argmax()
            text.append(token)
    assert generate(model, PROMPTS, 8, STOP, uniforms(5, 8)) != responses


def test_generation_stops_where_it_should():
    """A response ends with its first `stop` or after max_new_tokens, never elsewhere; what comes
    token by token is the same as what comes at once."""
    model, streamed = sampling_model(), [[] for _ in range(40)]
    prompts, u = [PROMPTS[i % 5] for i in range(40)], uniforms(40, 9)
    responses = generate(model, prompts, 9, STOP, u)
    assert all(STOP not in r[:-1] and (r[-1] == STOP or len(r) == 9) for r in responses)
    assert {r[-1] == STOP for r in responses} == {True, False}
    for rows, tokens in generate_tokens(model, prompts, 9, STOP, u):
        for row, token in zip(rows, tokens, strict=True):
            streamed[row].append(token)
    assert streamed == responses


@pytest.mark.parametrize("prompts", [[[1] * 23], [[2, 3]], [[1] * 20, [1] * 20],
                                     [[1] * 20, [2, 3], [4]]])
def test_generation_fills_the_context(drawn, prompts):
    """Without an end every row goes on to exactly block_size tokens, however long its neighbours'
    prompts are, and its last token has read all the others."""
    model, u = sampling_model(), uniforms(len(prompts), 40)
    responses = generate(model, prompts, 40, -1, u)
    assert {len(p) + len(r) for p, r in zip(prompts, responses)} == {24}
    check_teacher_forced(model, prompts, responses, u, drawn)


def test_generation_while_activations_are_recomputed():
    """A model that recomputes activations in training generates the same (catches a cache that is
    passed over)."""
    model, u = sampling_model(), uniforms(5, 8)
    expected = generate(model, PROMPTS, 8, STOP, u)
    model.model.recompute = True
    assert generate(model, PROMPTS, 8, STOP, u) == expected


def test_a_prompt_that_fills_the_context_is_refused():
    """A prompt without room for an answer ends the program in one line."""
    message = one_line(generate, sampling_model(), [[1], [1] * 24], 4, STOP, uniforms(2, 4))
    assert "24" in message and "context" in message


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_is_the_smallest_set_of_likeliest_words(scale, top_p):
    """Top-p keeps as few of the likeliest words as reach top_p together, for flat distributions and
    for peaked ones."""
    logits = scale * torch.randn(4, 3000, generator=torch.Generator().manual_seed(1))
    logits += 1e-4 * torch.arange(3000)  # no two alike
    p = logits.double().softmax(-1)
    for row, found in zip(p, next_token_probabilities(logits, top_p=top_p)):
        ordered, order = row.sort(descending=True)
        n = int((ordered.cumsum(-1) < top_p).sum()) + 1
        assert abs(int((found > 0).sum()) - n) <= 1  # by rounding
        expected = ordered[:n - 1] / ordered[:n].sum()
        torch.testing.assert_close(found[order[:n - 1]].double(), expected, rtol=2e-3, atol=1e-6)


def test_next_token_probabilities_by_hand():
    """Temperature, top-k and top-p against distributions worked out by hand."""
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]])

    def check(expected, temperature=1.0, **how):
        found = next_token_probabilities(p.log(), temperature, **how)
        close(found, torch.tensor([expected], dtype=torch.float32), 1e-6)

    check([0.1, 0.4, 0.2, 0.3])
    check([1 / 30, 16 / 30, 4 / 30, 9 / 30], temperature=0.5)
    check([0, 1, 0, 0], temperature=0)
    check([0, 4 / 7, 0, 3 / 7], top_k=2)
    check([0, 1, 0, 0], top_k=1)
    check([0.1, 0.4, 0.2, 0.3], top_k=9)
    check([0, 4 / 7, 0, 3 / 7], top_p=0.65)
    check([0, 4 / 9, 2 / 9, 3 / 9], top_p=0.75)
    check([0, 1, 0, 0], top_p=0.1)
    check([0, 1, 0, 0], top_k=2, top_p=0.55)         # of the two that are left, 4/7 > .55 is enough
    check([0, 4 / 7, 0, 3 / 7], top_k=2, top_p=0.6)  # and here it is not


P = torch.tensor([0.0, 0.3, 0.0, 0.05, 0.45, 0.2, 0.0])


def test_draws_follow_the_probabilities():
    """Frequencies of 100,000 draws fit the distribution (chi square), and what has probability 0 is
    never drawn."""
    n = 100_000
    tokens = draw(P.expand(n, -1), uniforms(n, 1).squeeze(1))
    counts = torch.bincount(tokens, minlength=7)
    assert (counts[P == 0] == 0).all()
    expected = n * P[P > 0]
    chi_square = ((counts[P > 0] - expected) ** 2 / expected).sum()
    assert chi_square < 16.3  # with 3 degrees of freedom, 1 in 1,000 is above


@pytest.mark.parametrize("largest", [torch.tensor(1 - 2 ** -24),
                                     torch.tensor(1 - 2 ** -53, dtype=torch.float64)])
def test_draws_at_the_ends(largest):
    """The smallest and the largest random number draw the first and the last token that has any
    probability, also from a large vocabulary, where sums in float32 end below or above 1."""
    ends = torch.stack([torch.zeros_like(largest), largest])
    assert draw(P.expand(2, -1), ends).tolist() == [1, 5]
    certain = torch.eye(4).repeat_interleave(2, 0)
    assert draw(certain, ends.repeat(4)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    likely = torch.tensor([[0.5, 2e-8, 0.5]])  # the second is there, but float32 would lose it
    assert draw(likely, torch.tensor([0.5 + 5e-9], dtype=torch.float64)).tolist() == [1]
    flat = torch.full((2, 100_003), 1 / 100_000)
    flat[:, 0] = flat[:, -2:] = 0
    assert draw(flat, ends).tolist() == [1, 100_000]


class OnApple(torch.Tensor):
    """A tensor that says that it lies on one of Apple's GPUs, where float64 does not exist."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function == torch.Tensor.device.__get__:
            return torch.device("mps")
        name = getattr(function, "__name__", "")
        if name == "cpu" or name == "to" and args[1:] in (("cpu",), (torch.device("cpu"),)):
            return args[0].as_subclass(torch.Tensor)
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework "
                            "doesn't support float64. Please use float32 instead.")
        return result


def test_draws_where_there_is_no_float64():
    """On Apple's GPUs, whose tensors have to be brought to the CPU *before* they become float64,
    draws are what they are elsewhere."""
    torch.manual_seed(0)
    probs, numbers = torch.randn(50, 300).softmax(-1), uniforms(50, 1).squeeze(1)
    there = probs.as_subclass(OnApple), numbers.as_subclass(OnApple)
    assert there[0].device.type == "mps"
    with pytest.raises(TypeError, match="float64"):
        there[0].double()
    assert draw(*there).tolist() == draw(probs, numbers).tolist()


# --------------------------------------------------------------------------------------------------
# Batches and random numbers

def test_epoch_batches():
    """An epoch visits no example twice and drops only what fills no batch; the rows of a batch have
    similar lengths; the generator alone decides, and another one drops and groups others."""
    lengths = [(7 * i) % 23 for i in range(103)]
    batches = epoch_batches(lengths, 4, random_stream(1, "epoch", 0))
    visited = [i for batch in batches for i in batch]
    assert [len(batch) for batch in batches] == [4] * 25
    assert len(set(visited)) == 100 and set(visited) < set(range(103))
    assert batches == epoch_batches(lengths, 4, random_stream(1, "epoch", 0))
    other = epoch_batches(lengths, 4, random_stream(1, "epoch", 1))
    assert not {frozenset(b) for b in batches} & {frozenset(b) for b in other}
    assert set(visited) != {i for batch in other for i in batch}
    waste = sum(max(lengths[i] for i in b) * 4 - sum(lengths[i] for i in b) for b in batches)
    unsorted = sum(max(lengths[i:i + 4]) * 4 - sum(lengths[i:i + 4]) for i in range(0, 100, 4))
    assert waste < unsorted / 2


def test_epoch_batches_come_in_no_order_of_length():
    """Short batches and long ones take turns (catches an epoch that goes from short to long)."""
    batches = epoch_batches(list(range(1024)), 4, random_stream(0, "epoch"))
    lengths = [np.mean(batch) for batch in batches]
    longer = np.mean([b > a for a, b in zip(lengths, lengths[1:])])
    assert 0.35 < longer < 0.65 and abs(np.corrcoef(lengths, range(256))[0, 1]) < 0.2


def windows_of(step, **changes):
    config = SimpleNamespace(**dict(batch_size=3, block_size=5, seed=1) | changes)
    return get_batch(np.arange(64, dtype=np.uint16), step, config)


def test_pretraining_batches():
    """Inputs are windows of the text, and targets the same windows one token further. An epoch
    visits all its windows once, without overlap; the next one cuts at another place, in another
    order."""
    epochs = []
    for first in (0, 11, 22):  # (64 - 1) // 5 - 1 = 11 windows an epoch
        starts = []
        for i in range(first, first + 11):
            x, y = windows_of(i // 3)
            assert x.shape == y.shape == (3, 5) and x.dtype == torch.int64
            assert (y == x + 1).all() and (x == x[:, :1] + torch.arange(5)).all()
            starts.append(int(x[i % 3, 0]))
        assert len({start % 5 for start in starts}) == 1
        assert len(set(starts)) == 11 and max(starts) - min(starts) == 50
        epochs.append(starts)
    assert len({starts[0] % 5 for starts in epochs}) > 1
    assert [s // 5 for s in epochs[0]] != [s // 5 for s in epochs[1]]


def test_pretraining_batches_depend_on_seed_and_step_alone():
    """The same step gives the same batch, whatever was read before; another seed gives another
    one."""
    expected = windows_of(4)[0]
    windows_of(40), windows_of(400)
    assert torch.equal(windows_of(4)[0], expected)
    assert not torch.equal(windows_of(4, seed=2)[0], expected)


@pytest.mark.parametrize("tie", [True, False])
def test_flops_per_token_by_hand(tie):
    """Of a small model: in each of two blocks q and o have 32·32 weights, k and v 32·16, the MLP
    3·32·48; the head 19·32, also if it is the embedding. Attention takes 12·4·8·24 a block."""
    weights = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48) + 19 * 32
    expected = 6 * weights + 2 * 12 * 4 * 8 * 24
    assert flops_per_token(LanguageModel(small_config(tie_embeddings=tie))) == expected == 114_240


def test_random_streams_depend_on_seed_and_purpose_alone():
    """The same numbers at every call, whatever was drawn before; others for another purpose or
    seed."""
    def numbers(*key):
        return random_stream(*key).random(3).tolist()

    first = numbers(1, "rollout", 7)
    np.random.random(5)
    assert numbers(1, "rollout", 7) == first
    keys = [(1, "rollout", 7), (2, "rollout", 7), (1, "rollout", 8), (1, "samples"), (1, "rollout")]
    assert len({tuple(numbers(*key)) for key in keys}) == 5


def test_pad():
    """Rows become one tensor, padded on the right to a multiple of 8."""
    assert pad([[1], [2, 3]], 9).tolist() == [[1] + [9] * 7, [2, 3] + [9] * 6]
    assert pad([list(range(8))]).shape == (1, 8) and pad([[1], [0] * 9]).shape == (2, 16)


# --------------------------------------------------------------------------------------------------
# Optimizer

@pytest.mark.parametrize("shape", [(24, 24), (40, 16), (16, 40)])
def test_newton_schulz_flattens_singular_values(shape):
    """Orthogonalisation brings singular values near 1 and keeps the singular vectors."""
    torch.manual_seed(0)
    g = torch.randn(shape, dtype=torch.float64)
    u, s, vt = torch.linalg.svd(g, full_matrices=False)
    s = torch.linspace(1, 0.03, len(s), dtype=torch.float64)
    x = newton_schulz(u * s @ vt)
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6 and values.max() < 1.3
    inner = u.mT @ x @ vt.mT
    close(inner, inner.diagonal().diag())


def test_muon_agrees_with_pytorchs():
    """Muon moves matrices as torch.optim.Muon, which computes in bfloat16, does over several steps:
    direction, length, momentum, decay."""
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(s)) for s in [(16, 16), (32, 16), (16, 32)]]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=0.05, momentum=0.9, weight_decay=0.3)
    optimizers = Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
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


@pytest.mark.parametrize("shape", [(8, 12), (12, 8)])
def test_muon_steps_by_its_formula(shape):
    """p ← (1 - ηλ) p - η √max(1, rows/columns) NS(μ m + (1 - μ) g), m = Σ (1 - μ) μ^age g,
    exactly."""
    torch.manual_seed(0)
    # Three of one shape, of very different sizes: each must be as if it were alone.
    params = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for _ in range(3)]
    seen = [[] for _ in params]
    optimizer = Muon(params, lr=0.05, momentum=0.9, weight_decay=0.3, dtype=torch.float64)
    for _ in range(4):
        old = [p.detach().clone() for p in params]
        for p, gradients, size in zip(params, seen, (1e-2, 1, 100)):
            p.grad = size * torch.randn_like(p)
            gradients.append(p.grad.clone())
        optimizer.step()
        for p, gradients, before in zip(params, seen, old):
            momentum = sum(0.1 * 0.9 ** age * g for age, g in enumerate(reversed(gradients)))
            update = newton_schulz(0.9 * momentum + 0.1 * gradients[-1])
            size = 0.05 * max(1, shape[0] / shape[1]) ** 0.5
            close(p.detach(), before * (1 - 0.05 * 0.3) - size * update, 1e-12)


@pytest.mark.parametrize("cls, tie", [(LanguageModel, True), (LanguageModel, False),
                                      (ScalarModel, True)])
def test_optimizer_splits_the_parameters(cls, tie):
    """Each parameter is in exactly one group; Muon has the blocks' matrices; vectors do not
    decay."""
    model = cls(small_config(tie_embeddings=tie))
    for rates in ((1e-3, 0.02), (1e-3,)):
        optimizer = Optimizer(model, *rates, weight_decay=0.1)
        groups = [group for part in optimizer.parts for group in part.param_groups]
        in_groups = [id(p) for group in groups for p in group["params"]]
        assert sorted(in_groups) == sorted(map(id, model.parameters()))
        for group in groups:
            for p in group["params"]:
                assert group["weight_decay"] == (0.1 if p.dim() == 2 else 0)
        of_muon = {id(p) for part in optimizer.parts if isinstance(part, Muon)
                   for group in part.param_groups for p in group["params"]}
        of_blocks = {id(p) for name, p in model.named_parameters()
                     if ".layers." in name and name.endswith("proj.weight")}
        assert of_muon == (of_blocks if len(rates) == 2 else set())


def test_optimizer_steps_at_a_factor_of_the_peak_rates():
    """step(factor) takes factor times the *peak* rates, whatever was set before, and forgets the
    gradients; so does an optimizer that was read from a file."""
    model = language_model()
    optimizer, again = Optimizer(model, 1e-3, 0.02), Optimizer(model, 1e-3, 0.02)

    def step(optimizer, factor):
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step(factor)
        rates = [group["lr"] for part in optimizer.parts for group in part.param_groups]
        assert rates == [1e-3 * factor, 1e-3 * factor, 0.02 * factor]
        assert all(p.grad is None for p in model.parameters())

    for factor in (0.5, 1.0, 0.25):
        step(optimizer, factor)
    again.load_state_dict(optimizer.state_dict())
    for factor in (1.0, 0.0):
        before = [p.detach().clone() for p in model.parameters()]
        step(again, factor)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before)) == (factor == 0)


def test_adam_has_the_betas_and_epsilon_it_is_given():
    """AdamW's two moments decay at two rates (catches betas = (b1, b1)): three steps by hand."""
    layer = nn.Module()
    layer.w = nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))
    optimizer = Optimizer(layer, 0.1, betas=(0.8, 0.9), eps=1e-5)
    m = v = x = 0.0
    for t, g in enumerate((1.0, -3.0, 0.5), 1):
        layer.w.grad = torch.full((2, 2), g, dtype=torch.float64)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g * g
        x -= 0.1 * (m / (1 - 0.8 ** t)) / (math.sqrt(v / (1 - 0.9 ** t)) + 1e-5)
        close(layer.w.detach(), torch.full((2, 2), x, dtype=torch.float64))


def test_learning_rate_factor():
    """Linear up over the warm-up, 1 at its end, linear down to 0."""
    assert [learning_rate_factor(s, 100, 10) for s in (0, 4, 9, 10)] == [0.1, 0.5, 1.0, 1.0]
    assert learning_rate_factor(55, 100, 10) == pytest.approx(0.5)
    assert learning_rate_factor(99, 100, 10) == pytest.approx(1 / 90)
    assert learning_rate_factor(100, 100, 10) == pytest.approx(0)
    assert learning_rate_factor(0, 40) == 1 and learning_rate_factor(30, 40) == pytest.approx(0.25)
    assert learning_rate_factor(3, 4, 10) == pytest.approx(0.4)


def test_gradients_are_clipped():
    """A gradient that is too long is scaled down as a whole, a short one is left, and the norm that
    it had is returned; one that is not finite ends the run in a line that names the step."""
    layer = nn.Linear(2, 1)
    for limit, factor in ((1.0, 1 / 13), (20.0, 1.0)):
        layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([12.0])
        assert clip_gradients(layer, limit, 1) == pytest.approx(13)
        close(layer.weight.grad, torch.tensor([[3.0, 4.0]]) * factor, 1e-5)
        close(layer.bias.grad, torch.tensor([12.0]) * factor, 1e-5)
    for bad in (math.nan, math.inf):
        layer.weight.grad, layer.bias.grad = torch.tensor([[3.0, bad]]), torch.tensor([12.0])
        message = one_line(clip_gradients, layer, 1.0, 7)
        assert "step 7" in message and str(bad) in message and "learning rate" in message
