"""The Transformer that all stages share, and what running a stage needs.

The architecture is Qwen3's: token embedding, then blocks of

    x = x + Attention(RMSNorm(x))      grouped-query attention, RMSNorm on every q and k, rotary positions
    x = x + MLP(RMSNorm(x))            SwiGLU: down(silu(gate(x)) * up(x))

then a last RMSNorm and a head. Modules carry Hugging Face's names, so a state dict saved here *is* a Qwen3 state dict.
Two models stand on the same trunk: `LanguageModel` (a number per word of the vocabulary) and `ScalarModel` (one
number per position: the reward model, and PPO's value function).

Sequences start at the left and are padded on the right, always. Attention is causal, so padding on the right cannot
reach a token before it: training needs no attention mask, and positions are 0 … T-1.

Shapes: B sequences, T tokens, C channels (n_embd), H heads, D channels per head, V words of the vocabulary.
"""

import contextlib
import ctypes
import dataclasses
import difflib
import filecmp
import json
import math
import os
import shlex
import signal
import sys
import time
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

IGNORE = -100  # a target that is not trained on: padding, prompts
THREADS = torch.get_num_threads()


def option(default, help, low=None, high=None, choices=None):
    """A config field: its default, one line of meaning, and the values that are possible."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class ModelConfig:
    """The shape of a Transformer (table [model] of a config file)."""
    n_layer: int = option(3, "number of blocks", low=1)
    n_head: int = option(4, "query heads", low=1)
    n_kv_head: int = option(2, "key and value heads, each shared by n_head / n_kv_head query heads", low=1)
    n_embd: int = option(128, "channels", low=2)
    n_inner: int = option(384, "channels inside the MLP", low=1)
    block_size: int = option(192, "context: the longest sequence, in tokens", low=8)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", low=1)
    tie_embeddings: bool = option(True, "the output head is the embedding matrix")
    vocab_size: int = 0  # not an option: it comes from the tokenizer

    def check(self):
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            return f"n_head={self.n_head} must divide n_embd={self.n_embd} into heads of an even number of channels"
        if self.n_head % self.n_kv_head:
            return f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}"


# ---------------------------------------------------------------------------------------------------------------------
# The Transformer

def rotate(x, cos, sin):
    """Rotary position embedding in the rotate-half convention (Su et al. 2021, eq. 34).

    Channel pair (i, i + D/2) turns by the angle position · theta^(-2i/D), so that q·k depends on positions only
    through their difference. x (B, H, T, D); cos, sin broadcastable to it."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-b, a), dim=-1) * sin.to(x.dtype)


def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v over the keys that `mask` (B, 1, T, S) allows; without one, over past and present.

    q (B, H, T, D); k, v (B, Hkv, S, D): each key head serves H / Hkv query heads. In bfloat16 on a CPU, plain matrix
    products are faster than PyTorch's fused kernel; everywhere else the kernel is."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    (B, H, T, D), (_, n, S, _) = q.shape, k.shape
    if mask is None and T > 256:  # what a half does not see is not computed, and large tables cost time
        half = T // 2
        earlier = attention(q[:, :, :half], k[:, :, :half], v[:, :, :half])
        later = attention(q[:, :, half:], k, v, torch.ones(1, 1, T - half, T, dtype=torch.bool).tril(half))
        return torch.cat((earlier, later), dim=2)
    mask = torch.ones(1, 1, T, S, dtype=torch.bool).tril() if mask is None else mask
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, -math.inf).expand(-1, H // n, T, S).flatten(1, 2)
    bias = bias.repeat_interleave(n, 0) if len(bias) == B else bias                             # 0 or -∞
    # The query heads that share a key head stand below each other: (B·Hkv, H/Hkv·T, D).
    q, k, v = q.reshape(B * n, -1, D), k.flatten(0, 1), v.flatten(0, 1)
    if k.requires_grad:
        k.register_hook(torch.Tensor.contiguous)  # its gradient comes transposed, and would slow down all before it
    scores = torch.baddbmm(bias.expand(B * n, -1, S), q, k.mT, alpha=D ** -0.5)                 # (B·Hkv, H/Hkv·T, S)
    return (scores.softmax(-1) @ v).view(B, H, T, D)


def autocast_dtype(x):
    """The precision that autocast, where it is on, gives to matrix products of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class Normalise(torch.autograd.Function):
    """x (…, C), gain (C,) → u · gain as `dtype`, u = x / √(mean(x²) + ε); fewer passes than autograd.

    dx = (h - u · mean(h · u)) / √(mean(x²) + ε), where h = dy · gain."""

    @staticmethod
    def forward(ctx, x, gain, dtype):
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = (length.square() / x.shape[-1] + 1e-6).rsqrt()
        unit = x * scale
        ctx.save_for_backward(unit.to(dtype), gain, scale)
        return (unit * gain).to(dtype)

    @staticmethod
    def backward(ctx, upstream):
        unit, gain, scale = ctx.saved_tensors
        both, weight = (upstream * unit).flatten(0, -2), gain.to(unit.dtype)                    # (n, C), (C,)
        mean = (both @ weight / len(weight)).view(scale.shape)
        dx = (upstream * weight).addcmul_(unit, mean, value=-1).mul_(scale.to(unit.dtype))
        return dx, both.sum(0, dtype=gain.dtype), None


class RMSNorm(nn.Module):
    """x / √(mean(x²) + ε), times a learned gain for each channel (Zhang & Sennrich 2019).

    Under autocast it gives bfloat16 at once: all that read it would convert it, each for itself."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        dtype = autocast_dtype(x)
        if x.requires_grad and x.device.type == "cpu" and dtype == torch.bfloat16:
            return Normalise.apply(x, self.weight, dtype)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6).to(dtype)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.n_embd // config.n_head
        kv_width = config.n_kv_head * self.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.k_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.v_proj = nn.Linear(config.n_embd, kv_width, bias=False)
        self.o_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.q_norm = RMSNorm(self.head_dim)
        self.k_norm = RMSNorm(self.head_dim)

    def forward(self, x, cos, sin, cache=None):
        B, T, C = x.shape
        q, k, v = (y.view(B, T, -1, self.head_dim).transpose(1, 2).contiguous()                 # (B, H or Hkv, T, D)
                   for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q, k, mask = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin), None
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)
        y = attention(q, k, v, mask)                                                            # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_inner, bias=False)
        self.down_proj = nn.Linear(config.n_inner, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.self_attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.n_embd)
        self.post_attention_layernorm = RMSNorm(config.n_embd)

    def forward(self, x, cos, sin, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The trunk: tokens (B, T) → hidden states (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        head_dim = config.n_embd // config.n_head
        frequency = config.rope_theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)     # (D/2,)
        length = config.block_size + 7                                  # `pad` rounds up
        angle = torch.outer(torch.arange(length).float(), frequency).repeat(1, 2)               # (length, D)
        # MKL sets itself up at the first call of such a function: here in one thread, as two that are first at once may
        # leave the table off by 1e-4, in one process of ten.
        angle[0].cos()
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.recompute = False  # in the backward pass compute a block's activations again, instead of keeping them

    def forward(self, tokens, cache=None):
        T = tokens.shape[1]
        if cache is None:
            cos, sin = self.cos[:T], self.sin[:T]                                               # (T, D)
        else:  # each row goes on where it has got to
            positions = cache.extend(T)                                                         # (B, T)
            cos, sin = self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)       # (B, 1, T, D)
        x = self.embed_tokens(tokens)                                                           # (B, T, C)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                x = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin, cache)
        return self.norm(x)


def init_weights(model):
    """GPT-2's initialisation: N(0, 0.02); projections back into the residual stream are smaller by √(2 n_layer)."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            small = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * model.model.config.n_layer) if small else 0.02)


class HeadLoss(torch.autograd.Function):
    """hidden (n, C), weight (V, C), targets (n,) → -log p(target), (n,) in float32, of p = softmax(logits).

    The vocabulary is the widest thing in a small model. What the backward pass wants of it, d loss / d logits =
    p - 1[target], is known as soon as p is: it takes the place of the logits, a few rows at a time, which stay in a
    CPU's cache. How much each token's loss counts then scales n·C numbers instead of n·V."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        logits, losses = F.linear(hidden, weight), []                                           # (n, V)
        rows = max(1, 2 ** (19 if logits.device.type == "cpu" else 27) // len(weight))
        for some, target in zip(logits.split(rows), targets[:, None].split(rows)):
            p = some.float()
            p -= p.amax(-1, keepdim=True)
            chosen = p.gather(1, target)
            total = p.exp_().sum(-1, keepdim=True)
            losses.append(total.log() - chosen)
            p /= total
            some.copy_(p.scatter_add_(1, target, torch.full_like(chosen, -1)))
        ctx.save_for_backward(hidden, weight, logits)
        return torch.cat(losses).squeeze(1)

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, gradient = ctx.saved_tensors
        upstream, hidden, weight = (x.to(gradient.dtype) for x in (upstream[:, None], hidden, weight))
        return upstream * (gradient @ weight), gradient.mT @ (upstream * hidden), None


class LanguageModel(nn.Module):
    """Trunk and vocabulary head: p(next token | tokens so far)."""

    def __init__(self, config):
        super().__init__()
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        init_weights(self)

    def forward(self, tokens, targets=None, temperature=1.0):
        """tokens (B, T) → logits (B, T, V); with targets (B, T) → the loss of each, -log p(target), (B, T).

        Where the target is IGNORE the loss is 0, and the vocabulary head, the dearest layer of a small model, is not
        computed at all."""
        hidden = self.model(tokens)                                                             # (B, T, C)
        if targets is None:
            return self.lm_head(hidden)
        wanted = targets != IGNORE
        chosen, targets = hidden[wanted] / temperature, targets[wanted]                         # (n, C), (n,)
        more = -len(targets) % 64  # few different shapes, as in `pad`
        loss = HeadLoss.apply(F.pad(chosen, (0, 0, 0, more)), self.lm_head.weight, F.pad(targets, (0, more)))
        return torch.zeros(wanted.shape, device=loss.device).masked_scatter(wanted, loss[:len(targets)])


class ScalarModel(nn.Module):
    """Trunk and one number per position: a value function. A reward model is that number at a sequence's last token."""

    def __init__(self, config):
        super().__init__()
        self.model = Transformer(config)
        self.score = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))  # Stiennon et al. 2020, B.1
        nn.init.zeros_(self.score.bias)

    def forward(self, tokens, lengths=None):
        """tokens (B, T) → (B, T); with the lengths (N,) of the first N rows → the score of each of them, (N,)."""
        scores = self.score(self.model(tokens)).squeeze(-1).float()
        return scores if lengths is None else scores[:len(lengths)].gather(1, lengths[:, None] - 1).squeeze(1)


# ---------------------------------------------------------------------------------------------------------------------
# Generation

class KVCache:
    """Keys and values of the tokens read so far, (layer, B, Hkv, length, D); each row has its own length."""

    def __init__(self, config, rows, length, device):
        self.shape = (config.n_layer, rows, config.n_kv_head, length, config.n_embd // config.n_head)
        self.keys = self.values = None  # until the first come
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0  # an upper bound of all lengths, known without asking the device
        self.ids = []     # the tokens read so far, where there is a single row

    def extend(self, T):
        """Make room for T more tokens a row; returns their positions (B, T)."""
        self.positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        self.lengths, self.longest = self.lengths + T, self.longest + T
        self.read = min(-(-self.longest // 16) * 16, self.shape[3])  # few different shapes, as in `pad`
        key_positions = torch.arange(self.read, device=self.lengths.device)
        self.mask = (key_positions <= self.positions[:, :, None]).unsqueeze(1)                  # (B, 1, T, read)
        return self.positions

    def update(self, layer, k, v):
        """Write k, v (B, Hkv, T, D) at the new positions; returns all keys, all values, and who may see whom."""
        if self.keys is None:
            self.keys, self.values = k.new_zeros(self.shape), k.new_zeros(self.shape)
        rows = torch.arange(len(k), device=k.device)[:, None]
        self.keys[layer][rows, :, self.positions] = k.transpose(1, 2)
        self.values[layer][rows, :, self.positions] = v.transpose(1, 2)
        return self.keys[layer, :, :, :self.read], self.values[layer, :, :, :self.read], self.mask

    def keep(self, rows):
        """Drop all rows but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]


def pad(sequences, value=0):
    """Lists of ids → one (B, T) tensor, padded on the right. T is a multiple of 8: CPU kernels are made anew for
    every new shape, which costs time and memory, and padding on the right changes nothing."""
    T = -(-max(map(len, sequences)) // 8) * 8
    return torch.tensor([list(s) + [value] * (T - len(s)) for s in sequences])


def epoch_batches(lengths, batch_size, key):
    """The batches of one epoch as lists of indices, a function of `key` alone.

    Examples are shuffled, then sorted by length within pools of eight batches: neighbours are about equally long, so
    little is padding, and yet every epoch groups them in another way."""
    rng = np.random.default_rng(key)
    order, pool = rng.permutation(len(lengths)), 8 * batch_size
    batches = []
    for i in range(0, len(order), pool):
        some = sorted(order[i:i + pool].tolist(), key=lambda n: lengths[n])
        batches += [some[j:j + batch_size] for j in range(0, len(some), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def next_token_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, V) → the distribution (B, V) that a token is drawn from. Temperature 0 puts all on the likeliest."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs = F.softmax(logits.float() / temperature, dim=-1)
    if top_k:
        kth = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]
        probs = probs.masked_fill(probs < kth, 0)
    if top_p < 1:  # the smallest set of words whose probabilities reach top_p (Holtzman et al. 2019)
        n, enough = 64, top_p * probs.sum(-1, keepdim=True)
        ordered, order = probs.topk(min(n, probs.shape[-1]))
        while n < probs.shape[-1] and (ordered.sum(-1, keepdim=True) < enough).any():  # rarely: few are enough
            n *= 8
            ordered, order = probs.topk(min(n, probs.shape[-1]))
        before = ordered.cumsum(-1) - ordered
        probs = torch.zeros_like(probs).scatter(-1, order, ordered.masked_fill(before >= enough, 0))
    return probs / probs.sum(-1, keepdim=True)


def draw(probs, uniform):
    """One token a row by the inverse of the cumulative distribution: probs (B, V), uniform (B,) in [0, 1) → (B,).

    The same distribution as torch.multinomial, many times faster, and the draw of a row depends on its own number."""
    cumulative = probs.double().cumsum(-1)
    token = torch.searchsorted(cumulative, (uniform.double() * cumulative[:, -1])[:, None], right=True).squeeze(-1)
    return token.clamp(max=probs.shape[-1] - 1)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop, uniforms, temperature=1.0, top_k=0, top_p=1.0, on_token=None,
             cache=None):
    """Continue every prompt until it has produced `stop`, max_new_tokens, or filled the context.

    prompts: lists of ids, none empty. uniforms (B, max_new_tokens): the random numbers, one for each token, so that a
    row's text depends on its own row of numbers alone, not on its neighbours in the batch. Rows that have ended leave
    the batch. Returns (responses, logprobs): for each prompt its new ids, `stop` included, and the log-probability of
    each under the distribution it was drawn from. `on_token(row, id)` is called for each new token. With a `cache` for
    the whole context, kept from call to call, a single prompt is read from where it departs from what it has read."""
    trunk, config, device = model.model, model.model.config, model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    if lengths.max() >= config.block_size:
        raise SystemExit(f"a prompt of {lengths.max()} tokens does not fit the context of {config.block_size}: "
                         "shorten it, or train with a larger --block_size")
    longest = min(config.block_size, int(lengths.max()) + max_new_tokens)
    cache = cache or KVCache(config, len(prompts), longest, device)
    known = min(len(os.path.commonprefix([cache.ids, prompts[0]])), len(prompts[0]) - 1)
    cache.lengths.fill_(known)
    cache.longest = known
    responses, logprobs = [[] for _ in prompts], [[] for _ in prompts]

    rows = torch.arange(len(prompts))                                   # who is in the batch
    hidden = trunk(pad(prompts)[:, known:lengths.max()].to(device), cache)  # (B, T, C): the prompts in one pass
    cache.lengths = lengths.to(device)                                  # padding was read, but is written over
    hidden = hidden[rows, cache.lengths - 1 - known]                    # (B, C): each row's last real token
    going = torch.ones(len(rows), dtype=torch.bool)                     # who has not ended
    for step in range(max_new_tokens):
        probs = next_token_probabilities(model.lm_head(hidden), temperature, top_k, top_p)      # (B, V)
        token = draw(probs, uniforms[rows, step].to(device))                                    # (B,)
        logprob = probs.gather(1, token[:, None]).squeeze(1).log()
        for row, is_going, t, l in zip(rows.tolist(), going.tolist(), token.tolist(), logprob.tolist()):
            if is_going:
                responses[row].append(t)
                logprobs[row].append(l)
                if on_token:
                    on_token(row, t)
        going &= (token.cpu() != stop) & (lengths[rows] + step + 1 < config.block_size)
        if not going.any() or step + 1 == max_new_tokens:
            break
        if going.float().mean() < 0.8:  # leaving copies the cache: not worth it for a row or two
            staying = going.nonzero().squeeze(1)
            cache.keep(staying.to(device))
            rows, token, going = rows[staying], token[staying.to(device)], going[staying]
        # A row that has ended but is still here may be full: it goes on reading at its last position.
        cache.lengths = cache.lengths.clamp(max=longest - 1)
        cache.longest = min(cache.longest, longest - 1)
        hidden = trunk(token[:, None], cache).squeeze(1)                                        # (B, C)
    cache.ids = prompts[0] + responses[0][:-1]
    return responses, logprobs


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer

def newton_schulz(g, steps=5):
    """Push the singular values of each matrix in g (N, R, C) towards 1 (Jordan et al. 2024, "Muon").

    Each step applies the odd polynomial a·x + b·x³ + c·x⁵ to the singular values, by matrix products alone."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g) / g.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    x = x.to(autocast_dtype(x), memory_format=torch.contiguous_format)
    for _ in range(steps):
        s = x @ x.mT
        s = torch.baddbmm(s, s, s, beta=b, alpha=c)  # b·s + c·s²
        x = torch.baddbmm(x, s, x, beta=a)           # a·x + s·x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a weight matrix moves by the same amount.

    Matrices of one shape are stacked and orthogonalised together, which on small models is most of the speed."""

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for shape, params in shapes.items():
                gradient = [p.grad for p in params]
                momentum = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in params]
                torch._foreach_lerp_(momentum, gradient, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradient, momentum, group["momentum"])  # Nesterov's look ahead
                update = newton_schulz(torch.stack(ahead)).to(ahead[0].dtype)
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, update.unbind(), alpha=-group["lr"] * max(1, shape[0] / shape[1]) ** 0.5)


class Optimizers:
    """Muon for the matrices of the blocks, AdamW for everything else (embeddings, heads, norms), as one optimizer.

    With `shard` each process keeps the state of a part of the weights, updates them and sends them to the others: the
    same result in less memory (Rajbhandari et al. 2020, "ZeRO", stage 1)."""

    def __init__(self, model, learning_rate, muon_learning_rate=0.0, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8,
                 muon_momentum=0.95, shard=False):
        def make(optimizer, params, **settings):
            if not (shard and dist.is_initialized()):
                return optimizer(params, **settings)
            from torch.distributed.optim import ZeroRedundancyOptimizer
            # Each process sends its part in one piece, not weight by weight.
            return ZeroRedundancyOptimizer(params, optimizer, parameters_as_bucket_view=True, **settings)

        inner, matrices, vectors = [], [], []
        for name, p in model.named_parameters():
            of_block = muon_learning_rate and ".layers." in name
            (vectors if p.dim() < 2 else inner if of_block else matrices).append(p)
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.all = [make(torch.optim.AdamW, groups, lr=learning_rate, betas=betas, eps=eps, fused=True)]
        if inner:
            self.all.append(make(Muon, inner, lr=muon_learning_rate, momentum=muon_momentum, weight_decay=weight_decay))
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.all]

    def step(self, factor=1.0):
        """One update at `factor` times the peak learning rates, then forget the gradients."""
        for optimizer, peaks in zip(self.all, self.peaks):
            for group, peak in zip(optimizer.param_groups, peaks):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad()

    def gather(self):
        """Collect the parts of all processes in the first, which alone can give the state_dict then."""
        for optimizer in self.all:
            if hasattr(optimizer, "consolidate_state_dict"):
                optimizer.consolidate_state_dict()

    def state_dict(self):
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states):
        for optimizer, state in zip(self.all, states):
            optimizer.load_state_dict(state)


def learning_rate_factor(step, steps, warmup=0):
    """Linear warm-up to 1 over `warmup` steps, then linear decay, which would reach 0 at step `steps`."""
    return (step + 1) / warmup if step < warmup else 1 - (step - warmup) / max(1, steps - warmup)


# ---------------------------------------------------------------------------------------------------------------------
# Running a stage: configuration, devices and processes, log, checkpoints

@dataclass
class RunConfig:
    """What all stages share (top level of a config file)."""
    out_dir: str = option("out/tiny", "the run folder: everything that a run makes lies in it")
    seed: int = option(1, "the seed of everything random", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu, cuda or mps", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "precision of matrix products", choices=("auto", "float32", "bfloat16"))
    max_new_tokens: int = option(72, "the longest response, in tokens", low=1)


@dataclass
class TrainConfig(RunConfig):
    """What the training stages have in common, each in its own table and some with a default of their own."""
    batch_size: int = option(32, "sequences, conversations or prompts a step, over all processes", low=1)
    micro_batch_size: int = option(32, "as many a GPU, or a CPU's thread, computes at once", low=1)
    learning_rate: float = option(1e-3, "peak rate of AdamW", low=0)
    muon_learning_rate: float = option(0.0, "peak rate of Muon (matrices of the blocks); 0: AdamW for all", low=0)
    weight_decay: float = option(0.0, "decay of the matrices", low=0)
    warmup_steps: int = option(10, "steps of linear warm-up; afterwards linear decay to 0", low=0)
    gradient_clip: float = option(1.0, "largest norm of the gradient", low=1e-9)
    resume: bool = option(False, "go on from the stage's .last.pt")


def closest(name, names):
    return f": did you mean {difflib.get_close_matches(name, names, n=1, cutoff=0)[0]}?"


def parse(name, option, value, where):
    """One value of the config, of the option's type and in its range, or one line that says what is wrong."""
    kind = option.type
    if where == f"--{name}" and kind is not str:  # the command line knows text only
        with contextlib.suppress(ValueError, KeyError):
            value = {"true": True, "false": False}[value.lower()] if kind is bool else kind(value)
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise SystemExit(f"{where}: {name} must be {'true or false' if kind is bool else kind.__name__}, not {value!r}")
    m = option.metadata
    if m["choices"] and value not in m["choices"]:
        raise SystemExit(f"{where}: {name} must be one of {', '.join(m['choices'])}, not {value!r}")
    if m["low"] is not None and value < m["low"] or m["high"] is not None and value > m["high"]:
        limit = f"at least {m['low']}" if m["high"] is None else f"between {m['low']} and {m['high']}"
        raise SystemExit(f"{where}: {name} must be {limit}, not {value}")
    return value


def load_config(cls, doc, argv=None):
    """Defaults, then the tables of --config=FILE that concern `cls`, then --key=value; and --help from the same fields.

    ModelConfig's fields stand in [model], RunConfig's at the top level of the file, all others in the stage's table."""
    for stream in (sys.stdin, sys.stdout):  # half a character, or one that a terminal lacks, is no reason to stop
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    argv = sys.argv[1:] if argv is None else list(argv)
    options = {f.name: f for f in dataclasses.fields(cls) if f.metadata}
    of_model = ModelConfig.__dataclass_fields__ if issubclass(cls, ModelConfig) else ()
    table_of = {name: "model" if name in of_model else None if name in RunConfig.__dataclass_fields__ else cls.table
                for name in options}
    if "--help" in argv or "-h" in argv:
        print(doc.strip() + "\n\noptions (--config=FILE.toml reads a file; those given here win):")
        for name, f in options.items():
            print(f"  --{name}={f.default!r}".ljust(36) + f.metadata["help"])
        raise SystemExit(0)

    given, arguments = {}, iter(argv)
    for argument in arguments:
        name, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or name not in [*options, "config"]:
            raise SystemExit(f"unknown option {argument!r}{closest(name, options)} (--help lists all)")
        if not equals:
            value = "true" if name in options and options[name].type is bool else next(arguments, None)
            if value is None:
                raise SystemExit(f"--{name} needs a value: --{name}=…")
        given[name] = value

    values = {}
    if path := given.pop("config", None):
        with blaming(f"{path}: cannot read this config"), open(path, "rb") as f:
            file = tomllib.load(f)
        stages = ("prepare", "model", "pretrain", "sft", "reward", "ppo", "sample")
        for name in file:
            if name in stages and not isinstance(file[name], dict):
                raise SystemExit(f"{path}: {name} must be a table: [{name}]")
            if isinstance(file[name], dict) and name not in stages:
                raise SystemExit(f"{path}: unknown table [{name}]{closest(name, stages)}")
        for table in {table_of[name] for name in options}:
            here = {k: v for k, v in file.items() if not isinstance(v, dict)} if table is None else file.get(table, {})
            for name, value in here.items():
                if table_of.get(name, 0) != table:
                    place = f"in [{table}]" if table else "at the top level"
                    valid = [n for n in options if table_of[n] == table]
                    raise SystemExit(f"{path}: unknown key {name} {place}{closest(name, valid)}")
                values[name] = parse(name, options[name], value, path)
    for name, value in given.items():
        values[name] = parse(name, options[name], value, f"--{name}")
    config = cls(**values)
    if hasattr(config, "check") and (wrong := config.check()):
        raise SystemExit(wrong)
    return config


def matrix_rate(device, dtype):
    """Floating-point operations per second of a large matrix product on this device: the ceiling that MFU refers to."""
    n = 512 if device.type == "cpu" else 4096
    a, best, end = torch.randn(n, n, device=device).to(dtype), 0.0, time.perf_counter() + 0.2
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(2):
            b = a @ a
        b[0, 0].item()  # waits until the device is done
        best = max(best, 2 * 2 * n**3 / (time.perf_counter() - start))
    return best


def choose_dtype(device, wanted):
    """(dtype of the matrix products, the reason in words). Many processors that know bfloat16 are slower with it."""
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    if device.type == "cpu":
        torch.set_num_threads(1)  # a busy second core would slow products on both, and decide by chance
        ratio = matrix_rate(device, torch.bfloat16) / matrix_rate(device, torch.float32)
        torch.set_num_threads(THREADS)
        return (torch.bfloat16 if ratio > 1.3 else torch.float32), f"bfloat16 products are {ratio:.1f} times as fast"
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return (torch.bfloat16 if native else torch.float32), f"the device has {'' if native else 'no '}native bfloat16"


def single_thread():
    """What a thread of the pool begins with: it shares no work with others."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


class Run:
    """One process of a running stage: its place among the processes, its device, the log, the request to stop.

    Used as a context: `with Run(config, "pretrain") as run:`. Under torchrun the processes join (NCCL on GPUs, gloo on
    CPUs) and end with the context; alone, world is 1 and nothing is sent. Ctrl-C or SIGTERM ask the loop to stop at its
    next step (`run.pause()`), so that it can save first; a second one stops at once."""

    def __init__(self, config, stage, graceful=True):
        self.config, self.script, self.started, self.stop_signal = config, f"{stage}.py", time.time(), None
        self.stage = f"{stage}-{config.variant}" if getattr(config, "variant", "") else stage
        self.graceful = graceful
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # torchrun's, after a process has died
        self.main = self.rank == 0
        available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
        kind = config.device if config.device != "auto" else next(d for d in ("cuda", "mps", "cpu") if available[d])
        if not available[kind]:
            raise SystemExit(f"--device={kind}: this machine has none; use --device=auto")
        self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device(kind)
        self.dtype, self.why = choose_dtype(self.device, config.dtype)
        torch.manual_seed(config.seed)
        torch.set_flush_denormal(True)  # tiny momenta would make CPU arithmetic crawl
        with contextlib.suppress(TypeError, AttributeError):  # glibc: keep what is freed, a step asks for it again
            # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_ARENA_MAX: threads that share an arena wait for each other
            for parameter, value in ((-3, 2**26), (-1, 2**30), (-8, THREADS + 1)):
                ctypes.CDLL(None).mallopt(parameter, value)
        # On a CPU each thread computes micro-batches of its own: small matrices are not worth sharing among threads.
        alone = kind == "cpu" and self.world == 1 and graceful and not getattr(config, "compile", False)
        self.threads = THREADS if alone else 1
        self.pool = ThreadPoolExecutor(self.threads, initializer=single_thread)
        torch.set_float32_matmul_precision("high")

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            # torchrun keeps its store when it restarts a group: addresses must not be mistaken for those of the dead.
            store, rank, world = next(dist.rendezvous("env://"))
            store = dist.PrefixStore(str(self.restarts), store)
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=world)
            if self.sum(float(self.dtype == torch.float32)) > 0:  # all of them alike
                self.dtype = torch.float32
        for name in (signal.SIGINT, signal.SIGTERM) if self.graceful else ():
            signal.signal(name, self.request_stop)
        try:
            self.open()
        except OSError as error:
            self.__exit__(OSError, error, None)
        return self

    def open(self):
        """Claim the run folder, and say what is run."""
        os.makedirs(self.config.out_dir, exist_ok=True)
        if self.main:
            self.lock()
            settings, threads = dataclasses.asdict(self.config), max(self.threads, torch.get_num_threads())
            print(f"{self.stage}: {self.device.type}, {str(self.dtype)[6:]} ({self.why}), {self.world} process(es), "
                  f"{threads} thread(s)\n  " + ", ".join(f"{k}={v}" for k, v in settings.items()))
            if not self.restarts:  # a restart goes on with the log of the run that broke off
                self.write_log(dict(stage=self.stage, config=settings))

    def __exit__(self, kind, error, trace):
        if self.world > 1 and kind is None:
            dist.destroy_process_group()
            sys.stdout.flush()
            os._exit(0)  # DDP keeps gloo's threads alive, and one that wakes during Python's shutdown would abort it
        if kind is KeyboardInterrupt:
            raise SystemExit(f"{self.stage}: interrupted; run it again to start over") from None
        if isinstance(error, OSError):  # a full disk, a file that may not be written
            raise SystemExit(f"{self.stage}: {error.strerror or error}: {error.filename or self.config.out_dir}; "
                             "what was there before is untouched") from None

    def lock(self):
        """One stage at a time may write into a run folder. The system gives the lock back, however a process ends."""
        if fcntl and self.stage != "sample":
            self.lock_file = open(self.path("run.lock"), "a+", encoding="utf-8")
            try:
                fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no child process inherits
            except (BlockingIOError, PermissionError):
                self.lock_file.seek(0)
                raise SystemExit(f"process {self.lock_file.read().strip()} is at work in {self.config.out_dir}: wait "
                                 "for it, or use another --out_dir") from None
            self.lock_file.truncate(0)
            self.lock_file.write(f"{os.getpid()}\n")
            self.lock_file.flush()

    def request_stop(self, number, frame):
        if self.stop_signal:
            raise SystemExit(128 + number)
        self.stop_signal = number

    def pause(self, step, steps, due, best=None, **more):
        """Write STAGE.last.pt when it is due, or when any process has been asked to stop, and then stop. Returns
        whether it was written."""
        stop, last = self.sum(float(self.stop_signal is not None)) > 0, f"{self.stage}.last.pt"
        if due or stop:
            self.save(last, step, best, **more)
        if stop and step < steps:
            if self.main:
                arguments = [a for a in sys.argv if a != "--resume"]
                print(f"stopped; saved {last}. Continue with: python {shlex.join(arguments)} --resume")
            if self.world > 1:
                dist.destroy_process_group()
            raise SystemExit(128 + (self.stop_signal or signal.SIGINT))
        return due or stop

    def elapsed(self):
        return time.time() - self.started

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def share(self, n):
        """This process's part of range(n)."""
        return range(self.rank * n // self.world, (self.rank + 1) * n // self.world)

    def parts(self, n, size, threads):
        """This process's part of range(n), cut into pieces of at most `size`, one for each of the threads at least."""
        mine = self.share(n)
        size = max(1, min(size, -(-len(mine) // threads)))
        return [mine[i:i + size] for i in range(0, len(mine), size)]

    def map(self, function, items):
        """[function(item), …]: on a CPU each thread works on items of its own."""
        return list(self.pool.map(function, items)) if self.threads > 1 else [function(item) for item in items]

    def evaluate(self, function, n, size):
        """The lists function(part) of all parts of range(n), joined: without gradients, shared among the processes."""
        def call(part):
            with torch.no_grad(), self.autocast():
                return function(part)

        return self.gather([item for items in self.map(call, self.parts(n, size, self.threads)) for item in items])

    def backward(self, model, n, micro_batch_size, loss_of):
        """Gradients of Σ loss_of(rows) over this process's share of a batch of n rows, micro-batch by micro-batch.

        loss_of(rows), of a slice, is the part of the *global* batch's mean loss that these rows are responsible for: a
        sum divided by a count over the global batch. Such parts add up, over micro-batches and processes, to the true
        mean; means of micro-batches would not. It may be a vector, whose first entry is the loss and whose others are
        figures to add up likewise. Returns the sum, as plain numbers."""
        return self.backward_all(n, micro_batch_size, (model, loss_of))[0]

    def backward_all(self, n, micro_batch_size, *pairs):
        """The same for several pairs (model, loss_of) of one batch: a list of their sums.

        On a CPU models share the threads: one pass over many rows is faster than several over few at once."""
        def forward(loss_of, rows):
            with self.autocast():
                figures = loss_of(slice(rows.start, rows.stop))
            return figures if figures.dim() == 0 else figures[0], figures.detach()

        def gradients(job):
            i, parts = job
            model, loss_of = pairs[i]
            sums, parameters = None, list(model.parameters())
            for rows in parts:
                loss, figures = forward(loss_of, rows)
                here = figures, *torch.autograd.grad(loss, parameters)
                sums = here if sums is None else [a.add_(b) for a, b in zip(sums, here)]
            return sums

        totals, threads = [0.0] * len(pairs), max(1, self.threads // len(pairs))
        parts = self.parts(n, micro_batch_size, threads)
        if self.threads > 1:  # each thread adds up its own, always the same ones
            jobs = [(i, parts[j::threads]) for j in range(min(threads, len(parts))) for i in range(len(pairs))]
            for (i, _), (figures, *gradient) in zip(jobs, self.map(gradients, jobs)):
                totals[i] = totals[i] + figures
                for p, g in zip(pairs[i][0].parameters(), gradient):
                    p.grad = g if p.grad is None else p.grad.add_(g)
            return [total.tolist() for total in totals]
        weight = self.world if parts else 0  # DDP divides by the number of processes
        for i, (model, loss_of) in enumerate(pairs):
            for rows in parts or [range(1)]:  # with nothing to do, take part in the exchange all the same
                last = not parts or rows == parts[-1]  # gradients are exchanged once a step, in the last backward pass
                with contextlib.nullcontext() if last or self.world == 1 else model.no_sync():
                    loss, figures = forward(loss_of, rows)
                    (loss * weight).backward()
                totals[i] = totals[i] + figures * (weight > 0)
        return [self.sum(total).tolist() for total in totals]

    def update(self, model, optimizer, loss, step, config, factor):
        """Clip the gradients and take a step, unless the loss has blown up; returns the norm before clipping."""
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), config.gradient_clip))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise SystemExit(f"step {step}: the loss is {loss}, its gradient {norm}. Lower the learning rate, or try "
                             "--dtype=float32; the last checkpoint is untouched")
        with self.autocast():  # Muon's matrix products
            optimizer.step(factor)
        return norm

    def sum(self, value):
        """A number or tensor added up over all processes."""
        if self.world == 1:
            return value
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() if not torch.is_tensor(value) else total.to(value.dtype)

    def gather(self, items):
        """The lists of all processes, joined in the order of ranks."""
        if self.world == 1:
            return items
        parts = [None] * self.world
        dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def wrap(self, model):
        """Every forward pass that is trained goes through what this returns: DDP averages gradients over processes."""
        model.to(self.device)
        if self.world == 1:
            return model
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)

    def uniforms(self, n, width, *key):
        """(n, width) random numbers that depend on the seed and `key` alone, not on the number of processes."""
        seed = hash((self.config.seed, *key)) % 2 ** 63  # of integers: the same in every process
        return torch.rand(n, width, generator=torch.Generator().manual_seed(seed))

    def log(self, step, message, **figures):
        """A line for people and the same numbers as a line of log.jsonl."""
        if self.main:
            print(message, flush=True)
            self.write_log(dict(dict(stage=self.stage, step=step, seconds=round(self.elapsed(), 2)), **figures))

    def write_log(self, record):
        with open(os.path.join(self.config.out_dir, "log.jsonl"), "a", encoding="utf-8") as f:
            f.write(json.dumps(record) + "\n")

    def path(self, name):
        return os.path.join(self.config.out_dir, name)

    def keep_earlier(self, *names):
        """Rename what an earlier run has left under these names to name.1.ext, or the next free number, so that nothing
        is overwritten."""
        for name in names if self.main else ():
            path, number = self.path(name), 1
            stem, ext = os.path.splitext(path)
            while os.path.exists(kept := f"{stem}.{number}{ext}"):
                number += 1
            if os.path.exists(path):
                os.rename(path, kept)
                print(f"  an earlier {name} is kept as {kept}")

    def publish(self, name):
        """Give name.tmp its final name. An earlier file is left alone if it is the same, else kept under another."""
        path = self.path(name)
        if os.path.exists(path):
            if filecmp.cmp(path, path + ".tmp", shallow=False):
                return os.remove(path + ".tmp")
            self.keep_earlier(name)
        os.replace(path + ".tmp", path)

    def start(self, tokenizer, parent, **parts):
        """Begin at step 0 and keep what an earlier run has left, or with --resume put all back where STAGE.last.pt has
        it. parts: the model, its optimizer and what else a checkpoint holds, by name. Returns the checkpoint."""
        self.saved, self.origin = parts, dict(tokenizer=tokenizer.hash, parent=parent)
        last = f"{self.stage}.last.pt"
        if not self.config.resume and not (self.restarts and os.path.exists(self.path(last))):
            self.keep_earlier(f"{self.stage}.pt", last)
            return dict(step=0, best=math.inf)
        checkpoint = load_checkpoint(self.path(last), f"python {self.script}", tokenizer.hash)
        try:
            for name, part in parts.items():
                part.load_state_dict(checkpoint[name])
        except (RuntimeError, ValueError, KeyError):
            raise SystemExit(f"{self.path(last)} has another [model] or optimizer: resume with the same options")
        torch.set_rng_state(checkpoint["random_state"])
        return checkpoint

    def save(self, name, step, best=None, **more):
        """Write a checkpoint by way of a temporary file: killed at any instant, a whole one is there, and once this
        returns, every process finds it."""
        for part in self.saved.values():
            if isinstance(part, Optimizers):
                part.gather()
        if not self.main:
            return self.barrier()
        path = self.path(name)
        checkpoint = dict({part: it.state_dict() for part, it in self.saved.items()}, step=step, best=best,
                          model_config=dataclasses.asdict(self.saved["model"].model.config),
                          config=dataclasses.asdict(self.config), random_state=torch.get_rng_state(), **self.origin,
                          **more)
        try:
            with open(path + ".tmp", "wb") as f:
                torch.save(checkpoint, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(path + ".tmp", path)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            with contextlib.suppress(OSError):
                os.remove(path + ".tmp")
            raise SystemExit(f"cannot write {path} (is the disk full?): {str(error).splitlines()[0]}; "
                             "an earlier file of that name is untouched")
        self.barrier()


def write_file(path, text):
    """Text into a file by way of a temporary one."""
    with open(path + ".tmp", "w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def need(path, command):
    """The path, if it is there; else one line that says which command makes it."""
    if not os.path.exists(path):
        raise SystemExit(f"no {path}: run {command} first")
    return path


@contextlib.contextmanager
def blaming(message):
    """Within it, what goes wrong is the fault of a file: the program ends in one line, the message and the error."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SystemExit(f"{message} ({type(error).__name__}: {error})")


def load_checkpoint(path, command, tokenizer_hash=None):
    """Read a checkpoint (tensors and plain values only, never a pickle of anything else) and check that it fits."""
    need(path, command)
    try:
        with zipfile.ZipFile(path) as file:  # which knows a checksum of each part; torch.load does not look at it
            if damaged := file.testzip():
                raise ValueError(f"{damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["model_config"] = ModelConfig(**checkpoint["model_config"])
    except Exception as error:  # torch raises many kinds for a damaged file
        raise SystemExit(f"{path} cannot be read as a checkpoint ({type(error).__name__}): "
                         f"it may be truncated or damaged; make it again with {command}")
    if tokenizer_hash and checkpoint.get("tokenizer") != tokenizer_hash:
        raise SystemExit(f"{path} was made with another tokenizer than {os.path.dirname(path)}/tokenizer.tiktoken: "
                         f"run {command} again, or use another --out_dir")
    return checkpoint


def restore(cls, checkpoint, device):
    """The model that a checkpoint holds, as a `cls`."""
    model = cls(checkpoint["model_config"]).to(device)
    model.load_state_dict(checkpoint["model"])
    return model


def load_reward_model(run, tokenizer, variant=""):
    """The model of reward.pt, or of the reward-NAME.pt that reward.py --variant=NAME has made."""
    name, more = (f"reward-{variant}.pt", f" --variant={variant}") if variant else ("reward.pt", "")
    return restore(ScalarModel, load_checkpoint(run.path(name), f"python reward.py{more}", tokenizer.hash), run.device)
