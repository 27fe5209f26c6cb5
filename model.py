"""The Transformer that all stages share, and what running a stage needs.

The architecture is Qwen3's: a token embedding, then blocks of

    x = x + Attention(RMSNorm(x))     grouped-query attention, RMSNorm on queries and keys, rotary
    x = x + MLP(RMSNorm(x))           SwiGLU: down(silu(gate(x)) * up(x))

then a last RMSNorm and a head. The modules carry Hugging Face's names: a LanguageModel's state dict
*is* a Qwen3 state dict. Two models share this trunk's code, not its weights: `LanguageModel` gives
a logit to every token of the vocabulary; `ScalarModel` one number per position: how good a response
is (the reward model), or how good it is expected to become (PPO's value function).

Sequences are aligned to the left and padded on the right, always. As attention is causal, padding
on the right cannot reach what is before it, and positions are 0 … T-1. A mask is needed only by a
KVCache, and where reward.py puts all responses to a prompt into one row.

In shape comments: B sequences, T tokens, S keys, C channels (n_embd), H query and Hkv key heads, D
channels a head, V vocabulary. Skip "Options" and what follows until pretrain.py leads back there.
"""

import argparse, atexit, ctypes, difflib, functools, gc, json, math, os, pickle, shlex, signal, sys
import time, tomllib, zipfile, zlib
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace

import filelock  # comes with torch
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.utils.checkpoint

IGNORE = -100  # a target that is not trained on (padding, a prompt), as in F.cross_entropy

def option(default, help, low=None, high=None, choices=None):
    """A field of a config: its default, one line of help, and which values are possible."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))

@dataclass
class ModelConfig:
    """The shape of a Transformer: table [model] of a config file."""
    n_layer: int = option(3, "number of blocks", low=1)
    n_head: int = option(4, "query heads", low=1)
    n_kv_head: int = option(2, "key and value heads, each for several query heads", low=1)
    n_embd: int = option(128, "channels", low=2)
    head_dim: int = option(0, "channels per head; 0: n_embd / n_head", low=0)
    n_inner: int = option(384, "channels inside the MLP", low=1)
    block_size: int = option(192, "context: the longest sequence, in tokens", low=8)
    rope_theta: float = option(10000.0, "base of the rotary frequencies", low=1)
    tie_embeddings: bool = option(True, "the output head is the embedding matrix")
    vocab_size: int = 0  # not an option: it comes from the tokenizer
    def check(self):
        """What is wrong with the shape, in a line; None if nothing is."""
        if self.n_head % self.n_kv_head:
            return f"n_kv_head={self.n_kv_head} must divide n_head={self.n_head}"
        if (self.head_dim or self.n_embd / self.n_head) % 2:  # rotary positions pair channels up
            return f"n_embd={self.n_embd} / n_head={self.n_head}, or head_dim, must be even"

# --------------------------------------------------------------------------------------------------
# The Transformer
def rotate(x, cos, sin):
    """Rotary position embedding (Su et al. 2021), in the rotate-half layout of Hugging Face.

    The channels i and i + D/2 form a pair (in the paper 2i and 2i + 1), turned by the angle
    position · θ^(-2i/D). So positions enter query · key through their difference only.
    x (B, H, T, D); cos and sin broadcast to it."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-second, first), dim=-1) * sin.to(x.dtype)

class RMSNorm(nn.RMSNorm):
    """x / √(mean(x²) + ε), times a learned gain for each channel (Zhang & Sennrich 2019)."""
    def forward(self, x):  # autocast may make x bfloat16, but leaves the gain float32: cast it
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), eps=1e-6)

def attention(q, k, v, mask=None):
    """softmax(q kᵀ / √D) v over the keys that the mask (B, 1, T, S) allows; without a mask, causal.
    q (B, H, T, D); k, v (B, Hkv, S, D): each key head serves H / Hkv query heads.
    On a CPU in bfloat16 plain matrix products are a quarter faster than PyTorch's kernel."""
    if v.device.type != "cpu" or v.dtype != torch.bfloat16:  # 0.0 is dropout; no mask means causal
        return F.scaled_dot_product_attention(q, k, v, mask, 0.0, mask is None, enable_gqa=True)
    (B, H, T, D), (_, Hkv, S, _) = q.shape, k.shape
    allowed = torch.ones(T, S, dtype=torch.bool).tril() if mask is None else mask[:, :, None]
    bias = torch.where(allowed, 0.0, -torch.inf).to(q.dtype)                           # (…, T, S)
    scores = (q.reshape(B, Hkv, -1, D) @ k.mT).view(B, Hkv, H // Hkv, T, S)
    weights = torch.add(bias, scores, alpha=D**-0.5).softmax(-1)           # (B, Hkv, H/Hkv, T, S)
    return (weights.view(B, Hkv, -1, S) @ v).view(B, H, T, D)

class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer  # where this layer's keys and values stand in a cache
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.n_embd, config.n_kv_head * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=False)
        self.q_norm = RMSNorm(config.head_dim)
        self.k_norm = RMSNorm(config.head_dim)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)      # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)      # (B, Hkv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)      # (B, Hkv, T, D)
        q = rotate(self.q_norm(q), cos, sin)
        k = rotate(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v, mask = cache.update(self.layer, k, v)
        y = attention(q, k, v, mask)                                               # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))                        # (B, T, C)

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
    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))

class Transformer(nn.Module):
    """The trunk: tokens (B, T) → hidden states (B, T, C)."""
    def __init__(self, config):
        super().__init__()
        head_dim = config.head_dim or config.n_embd // config.n_head
        self.config = config = replace(config, head_dim=head_dim)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd)
        self.recompute = False  # True: less memory, as the backward pass computes activations anew
        frequency = config.rope_theta ** (-np.arange(0, head_dim, 2) / head_dim)       # (D/2,)
        positions = np.arange(config.block_size + 7)                # `pad` may round T up by 7
        angle = np.tile(np.outer(positions, frequency), 2)                             # (T, D)
        self.register_buffer("cos", torch.tensor(np.cos(angle)).float(), persistent=False)
        self.register_buffer("sin", torch.tensor(np.sin(angle)).float(), persistent=False)

    def forward(self, tokens, cache=None, positions=None, mask=None):
        """positions (B, T) and mask (B, 1, T, T) only where a row is more than one text."""
        T = tokens.shape[1]
        if cache is not None:  # each row continues at its own length
            positions = cache.extend(T)                                                # (B, T)
        at = slice(T) if positions is None else positions[:, None]
        cos, sin = self.cos[at], self.sin[at]                           # (T, D) or (B, 1, T, D)
        x = self.embed_tokens(tokens)                                                  # (B, T, C)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = torch.utils.checkpoint.checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask, cache)
        return self.norm(x)

class LanguageModel(nn.Module):
    """Trunk and vocabulary head: p(next token | tokens so far)."""
    def __init__(self, config):
        super().__init__()
        self.model = Transformer(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() == 2:  # as in GPT-2: smaller where a layer adds to the residual stream
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer) if adds else 0.02)
    def forward(self, tokens, targets=None, temperature=1.0, dense=False):
        """tokens (B, T) → logits (B, T, V). With targets (B, T) → the loss of each target,
        -log p(target) at `temperature`, (B, T), which is 0 where the target is IGNORE.

        The vocabulary head, the most expensive layer of a small model, is computed only where there
        is a target. `dense` says that all positions have one (and the temperature is 1), as in
        pretraining: then nothing is selected, and torch.compile sees a single graph."""
        hidden = self.model(tokens)                                                    # (B, T, C)
        if targets is None:
            return self.lm_head(hidden)
        if dense:
            logits = self.lm_head(hidden).flatten(0, 1).float()                        # (B·T, V)
            return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)
        wanted = targets != IGNORE                                                     # (B, T)
        logits = self.lm_head(hidden[wanted]).float() / temperature                    # (n, V)
        loss = F.cross_entropy(logits, targets[wanted], reduction="none")              # (n,)
        return loss.new_zeros(targets.shape).masked_scatter(wanted, loss)              # (B, T)

class ScalarModel(nn.Module):
    """Trunk and one number per position: a value function; or, read at a sequence's last token
    alone, a reward model. In reward.py only the head is new, in ppo.py nothing is."""
    def __init__(self, config):
        super().__init__()
        self.model = Transformer(config)
        self.score = nn.Linear(config.n_embd, 1)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))  # Stiennon et al.
        nn.init.zeros_(self.score.bias)
    def forward(self, tokens, lengths=None, positions=None, mask=None):
        """tokens (B, T) → a value for each position, (B, T). With the lengths (B,) of the sequences
        → the score of each, its value at the last token, (B,). The others: as in Transformer."""
        values = self.score(self.model(tokens, None, positions, mask)).squeeze(-1).float()
        return values if lengths is None else values.gather(1, lengths[:, None] - 1).squeeze(1)

# --------------------------------------------------------------------------------------------------
# Generation
class KVCache:
    """The keys and values of the tokens read so far, so that a new token costs one step and not a
    pass over the whole text. Each row has its own length."""
    def __init__(self, config, rows, size, device):
        self.shape = (config.n_layer, rows, config.n_kv_head, size, config.head_dim)
        self.keys = self.values = None  # made when the first ones come, in their dtype
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.longest = 0  # the longest live row at most, as an int: no wait for the GPU
    def extend(self, T):
        """Make room for T more tokens in each row; returns their positions (B, T)."""
        size, device = self.shape[3], self.lengths.device
        new = self.lengths[:, None] + torch.arange(T, device=device)                   # (B, T)
        self.positions = new.clamp(max=size - 1)  # a prompt's padding, or a row that has ended
        self.lengths, self.longest = self.lengths + T, min(self.longest + T, size)
        self.read = min(-(-self.longest // 16) * 16, size)  # in steps of 16: few different shapes
        keys = torch.arange(self.read, device=device)
        self.mask = (keys <= self.positions[:, :, None]).unsqueeze(1)              # (B, 1, T, read)
        return self.positions
    def update(self, layer, k, v):
        """Write k, v (B, Hkv, T, D) at the new positions of a layer. Returns all its keys, all its
        values, and the mask that says which of them each new token may see."""
        if self.keys is None:
            self.keys, self.values = k.new_zeros(self.shape), v.new_zeros(self.shape)
        rows = torch.arange(len(k), device=k.device)[:, None]                          # (B, 1)
        self.keys[layer][rows, :, self.positions] = k.transpose(1, 2)    # indexed axes come first:
        self.values[layer][rows, :, self.positions] = v.transpose(1, 2)           # (B, T, Hkv, D)
        return self.keys[layer, :, :, :self.read], self.values[layer, :, :, :self.read], self.mask
    def keep(self, rows):
        """Drop all rows but these."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]
        self.lengths = self.lengths[rows]

def next_token_probabilities(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Logits (B, V) → the distribution (B, V) that a token is drawn from. Temperature 0 puts all of
    it on the likeliest token; top_k and top_p keep the likeliest few (Holtzman et al. 2019)."""
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    probs = F.softmax(logits.float() / temperature, dim=-1)
    if top_k:
        least = probs.topk(min(top_k, probs.shape[-1])).values[:, -1:]  # of those to keep
        probs = probs.masked_fill(probs < least, 0)
    if top_p < 1:
        ordered, order = probs.sort(descending=True)
        before = ordered.cumsum(-1) - ordered  # what all likelier tokens have together
        ordered = ordered.masked_fill(before >= top_p * probs.sum(-1, keepdim=True), 0)
        probs = torch.zeros_like(probs).scatter(-1, order, ordered)
    return probs / probs.sum(-1, keepdim=True)

def draw(probs, uniform):
    """Draw a token for each row: probs (B, V), uniform random numbers (B,) in [0, 1) → (B,).

    The token is found where the cumulative distribution passes the random number: the distribution
    of torch.multinomial, many times faster, and each row depends on its own number alone."""
    if probs.device.type == "mps":
        probs, uniform = probs.cpu(), uniform.cpu()  # Apple's GPUs lack float64, needed for sums
    cumulative = probs.double().cumsum(-1)                                             # (B, V)
    at = uniform.to(cumulative)[:, None] * cumulative[:, -1:]                          # (B, 1)
    return torch.searchsorted(cumulative, at, right=True).squeeze(1).clamp(max=probs.shape[1] - 1)

def pad(sequences, value=0):
    """Lists of ids → one tensor (B, T), padded on the right. T is a multiple of 8: on a CPU every
    new shape costs time and memory, and padding on the right changes no result."""
    T = -(-max(len(s) for s in sequences) // 8) * 8
    return torch.tensor([list(s) + [value] * (T - len(s)) for s in sequences])

@torch.no_grad()
def generate_tokens(model, prompts, max_new_tokens, stop, uniforms, temperature=1.0, top_k=0,
                    top_p=1.0):
    """Continue every prompt, token by token, until it has said `stop`, is max_new_tokens longer, or
    has filled the context. Yields after each step the rows that got a token, and their tokens.

    prompts: B lists of ids. uniforms (B, max_new_tokens): the random numbers, one for each token,
    so that what a row says does not depend on its neighbours in the batch."""
    config, device = model.model.config, model.lm_head.weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    longest = int(lengths.max())
    if longest >= config.block_size:
        raise SystemExit(f"a prompt of {longest} tokens fills the context: shorten it")
    cache = KVCache(config, len(prompts), min(config.block_size, longest + max_new_tokens), device)
    hidden = model.model(pad(prompts).to(device), cache)        # (B, T, C): all prompts in one pass
    cache.lengths, cache.longest = lengths.to(device), longest  # padding: unseen, then overwritten
    rows = torch.arange(len(prompts))
    hidden = hidden[rows, lengths - 1]                          # (B, C): each row's last real token
    active = torch.ones(len(prompts), dtype=torch.bool)         # which rows of the batch go on
    for step in range(max_new_tokens):
        probs = next_token_probabilities(model.lm_head(hidden), temperature, top_k, top_p)
        tokens = draw(probs, uniforms[rows, step].to(device)).cpu()                    # (B,)
        yield rows[active].tolist(), tokens[active].tolist()
        active = active & (tokens != stop) & (lengths[rows] + step + 1 < config.block_size)
        if not active.any():
            break
        if active.float().mean() < 0.8:  # dropping rows copies the cache: not for a few of them
            cache.keep(active.to(device))
            rows, tokens, active = rows[active], tokens[active], active[active]  # now all are True
        hidden = model.model(tokens[:, None].to(device), cache).squeeze(1)             # (B, C)

def generate(model, prompts, *settings, **more):
    """What generate_tokens says, all at once: for each prompt the list of its new ids."""
    responses = [[] for _ in prompts]
    for rows, tokens in generate_tokens(model, prompts, *settings, **more):
        for row, token in zip(rows, tokens):
            responses[row].append(token)
    return responses

# --------------------------------------------------------------------------------------------------
# Optimizer
def newton_schulz(x, steps=5):
    """Push the singular values of each matrix of x (…, R, C) near 1 (0.7 to 1.2): a step maps s to
    a·s + b·s³ + c·s⁵, by matrix products alone (Jordan et al. 2024, "Muon")."""
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x) / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)  # s ≤ 1
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x

class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised: every direction of a weight matrix moves by the same
    amount. torch.optim.Muon does the same, but always in bfloat16, which on a CPU without bfloat16
    takes ten times as long as all the rest of a step."""
    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      dtype=dtype))  # of the matrix products
    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for R, C in {p.shape for p in group["params"]}:  # one stack for each shape: faster
                same = [p for p in group["params"] if p.shape == (R, C)]
                gradients = torch.stack([p.grad for p in same])                        # (n, R, C)
                momentum = self.state[same[0]].setdefault("momentum", torch.zeros_like(gradients))
                momentum.lerp_(gradients, 1 - group["momentum"])
                ahead = gradients.lerp(momentum, group["momentum"])  # Nesterov's look ahead
                size = group["lr"] * max(1, R / C) ** 0.5  # as Jordan: tall matrices move more
                for p, update in zip(same, newton_schulz(ahead.to(group["dtype"]))):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-size)

class Optimizer:
    """Muon for the matrices of the blocks (if it has a learning rate), AdamW for everything else:
    embeddings, heads and norms. Only matrices decay. `muon`: the momentum and dtype of Muon."""
    def __init__(self, model, learning_rate, muon_learning_rate=0.0, weight_decay=0.0,
                 betas=(0.9, 0.95), eps=1e-8, **muon):
        blocks, matrices, vectors = [], [], []
        for name, p in model.named_parameters():
            by_muon = muon_learning_rate and p.dim() == 2 and ".layers." in name
            (blocks if by_muon else matrices if p.dim() == 2 else vectors).append(p)
        groups = [dict(params=matrices, weight_decay=weight_decay, peak=learning_rate),
                  dict(params=vectors, weight_decay=0.0, peak=learning_rate)]
        self.parts = [torch.optim.AdamW(groups, learning_rate, betas, eps, fused=True)]
        if blocks:
            group = dict(params=blocks, peak=muon_learning_rate)
            self.parts.append(Muon([group], muon_learning_rate, weight_decay=weight_decay, **muon))
    def step(self, factor=1.0):
        """One update at `factor` times the peak learning rates, then forget the gradients."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor
            part.step()
            part.zero_grad()
    def state_dict(self):
        return [part.state_dict() for part in self.parts]
    def load_state_dict(self, states):
        for part, state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)

def learning_rate_factor(step, steps, warmup=0):
    """Linear warm-up to 1 over `warmup` steps, then linear decay, to reach 0 at step `steps`."""
    return (step + 1) / warmup if step < warmup else 1 - (step - warmup) / max(1, steps - warmup)

def clip_gradients(model, limit, step):
    """Scale the gradient down to a norm of at most `limit`; returns the norm that it had."""
    norm = float(nn.utils.clip_grad_norm_(model.parameters(), limit))
    if not math.isfinite(norm):
        raise SystemExit(f"step {step}: the gradient is {norm}; try a lower learning rate")
    return norm

# --------------------------------------------------------------------------------------------------
# Options
@dataclass
class RunConfig:
    """What all stages share: the top level of a config file."""
    out_dir: str = option("out/tiny", "the run folder: everything that a run makes lies in it")
    seed: int = option(1, "the seed of everything random", low=0, high=2**64 - 1)
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    dtype: str = option("auto", "of matrix products", choices=("auto", "float32", "bfloat16"))
    max_new_tokens: int = option(72, "the longest response, in tokens", low=1)

@dataclass
class TrainConfig(RunConfig):
    """Options of every training stage; a stage may override the defaults, in its class or table."""
    batch_size: int = option(32, "examples a step, over all processes", low=1)
    micro_batch_size: int = option(32, "examples that a process computes at once", low=1)
    learning_rate: float = option(1e-3, "peak rate of AdamW", low=0)
    muon_learning_rate: float = option(0.0, "peak rate of Muon; 0: AdamW for all weights", low=0)
    weight_decay: float = option(0.0, "decay of the matrices", low=0)
    warmup_steps: int = option(10, "steps of linear warm-up; then linear decay to 0", low=0)
    gradient_clip: float = option(1.0, "largest norm of the gradient", low=1e-9)
    resume: bool = option(False, "continue from the stage's .last.pt, with the options it had")

class Parser(argparse.ArgumentParser):
    """An argparse that reports a mistake in one line, which begins with where it was made."""
    where = "command line"
    def error(self, message):
        if unknown := message.partition("unrecognized arguments: ")[2]:
            closest = difflib.get_close_matches(unknown, self._option_string_actions, 1, cutoff=0)
            message = f"unknown option {unknown}: did you mean {closest[0]}?"
        raise SystemExit(f"{self.where}: {message} (--help lists all options)")

def parse_value(text, kind, low, high):
    """The text of an option as a value of its type and within its limits, or an error."""
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    value = kind(text)
    if low is not None and not low <= value <= (high or sys.float_info.max):
        raise argparse.ArgumentTypeError(f"must be from {low} to {high or 'anything'}, not {text}")
    return value

def read_config_file(path, tables):
    """The options in these tables of a TOML file, and at its top level, as --name=value."""
    try:
        with open(path, "rb") as f:
            file = tomllib.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise SystemExit(f"{path}: cannot read this config ({error})")
    file.pop("config", None)  # a file cannot name another one
    values = {name: value for name, value in file.items() if not isinstance(value, dict)}
    for name in sorted(file.keys() - values.keys()):
        close = difflib.get_close_matches(name, tables, 1, cutoff=0.75)
        if name in tables:
            values |= file[name]
        elif close:  # a table of ours, misspelt; others are somebody else's
            raise SystemExit(f"{path}: unknown table [{name}]: did you mean [{close[0]}]?")
    return [f"--{name}={value}" for name, value in values.items()]

def load_config(cls, doc, argv=None):
    """The options of a stage: the defaults of the dataclass `cls`, then the tables of --config=FILE
    that concern it, then --name=value on the command line. A mistake ends in one line."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack letters
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", metavar="FILE", help="a TOML file of options; those here win")
    for f in [f for f in fields(cls) if f.metadata]:
        m = f.metadata
        kind = functools.partial(parse_value, kind=f.type, low=m["low"], high=m["high"])
        kind.__name__ = f.type.__name__  # which argparse's messages name
        flag = dict(nargs="?", const=True) if f.type is bool else {}  # --resume means --resume=true
        text = f"{m['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument(f"--{f.name}", type=kind, help=text, choices=m["choices"], **flag)
    given = vars(parser.parse_args(argv))
    if "config" in given:
        parser.where = given.pop("config")
        tables = [cls.table, "model"] if issubclass(cls, ModelConfig) else [cls.table]
        given = vars(parser.parse_args(read_config_file(parser.where, tables))) | given
    config = cls(**given)
    if getattr(config, "resume", False):
        config = options_of_checkpoint(config, given)
    if hasattr(config, "check") and (mistake := config.check()):
        parser.error(mistake)
    return config

def options_of_checkpoint(config, given):
    """What --resume continues with: the options of the checkpoint. One that was given and differs
    is an error, unless it changes no result."""
    path = os.path.join(config.out_dir, f"{stage_name(config)}.last.pt")
    checkpoint = load_checkpoint(path, f"python {config.table}.py")
    options = checkpoint["config"] | dict(dtype=checkpoint["dtype"], out_dir=config.out_dir)
    for name, value in given.items():
        if name in ("out_dir", "device", "micro_batch_size", "recompute", "compile", "resume"):
            options[name] = value
        elif value != (was := checkpoint["config"][name]):
            raise SystemExit(f"--resume: {path} was made with {name}={was}, not {value}")
    return type(config)(**options)

# --------------------------------------------------------------------------------------------------
# Running a stage: device and processes, the log, checkpoints
def stage_name(config):
    """The stage's name in file names and in the log: reward, or reward-NAME for a variant."""
    variant = getattr(config, "variant", "")
    return f"{config.table}-{variant}" if variant else config.table

def matrix_rate(device, dtype):
    """Measured FLOP/s of large matrix products; MFU (model FLOPs utilisation) is a share of it."""
    n, best = 512 if device.type == "cpu" else 8192, math.inf
    a = torch.randn(n, n, device=device).to(dtype) / n**0.5
    for _ in range(8):
        start = time.perf_counter()
        (a @ a @ a @ a @ a)[0, 0].item()  # 4 products; item() waits until they are done
        best = min(best, time.perf_counter() - start)
    return 4 * 2 * n**3 / best

def choose_dtype(device, wanted):
    """The dtype of matrix products, and why. Many a CPU that knows bfloat16 is slower with it."""
    if wanted != "auto":
        return getattr(torch, wanted), "as asked"
    ratio = matrix_rate(device, torch.bfloat16) / matrix_rate(device, torch.float32)
    return torch.bfloat16 if ratio > 1.3 else torch.float32, f"bfloat16 is {ratio:.1f} × as fast"

class Run:
    """One process of a running stage: its device, its place among the processes, log, checkpoints.
    Under torchrun they find each other here. `main` is the one that logs and saves."""
    def __init__(self, config):
        self.config, self.stage, self.started = config, stage_name(config), time.time()
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.main, self.stop_asked = self.rank == 0, False
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        best = accelerator.type if accelerator else "cpu"
        kind = best if config.device == "auto" else config.device
        if kind not in ("cpu", best):
            raise SystemExit(f"--device={kind}: this machine has none; use --device=auto")
        self.device = torch.device(kind)
        if kind == "cuda":
            self.device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        if self.world > 1:
            device = dict(device_id=self.device) if kind == "cuda" else {}
            dist.init_process_group("nccl" if kind == "cuda" else "gloo", **device)
            atexit.register(dist.destroy_process_group)
            atexit.register(gc.collect)  # runs first: DDP must be gone before gloo's threads are
        torch.set_float32_matmul_precision("high")
        self.dtype, self.why = choose_dtype(self.device, config.dtype)
        if self.sum(float(self.dtype == torch.float32)) > 0:
            self.dtype = torch.float32  # where one process needs it, all take it
        torch.manual_seed(config.seed)
        torch.set_flush_denormal(True)  # tiny momenta would make CPU arithmetic crawl
        if sys.platform == "linux":  # keep freed memory: fetching pages anew is a sixth of a step
            for parameter in (-1, -3):  # glibc's M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
                ctypes.CDLL(None).mallopt(parameter, 2**30)
        self.lock = lock_folder(config) if self.main and config.table != "sample" else None
    def path(self, name):
        return os.path.join(self.config.out_dir, name)
    def autocast(self):
        """Matrix products in bfloat16, if that is the dtype; sums and weights in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)
    @contextmanager
    def evaluating(self, model):
        """Without gradients, in eval mode, in the run's dtype; then back in the mode it was in."""
        was_training = model.training
        with torch.no_grad(), self.autocast():
            yield model.eval()
        model.train(was_training)
    def sum(self, value):
        """A number or a tensor, added up over all processes."""
        if self.world == 1:
            return value
        total = torch.as_tensor(value, dtype=torch.float64, device=self.device).clone()
        dist.all_reduce(total)
        return total if torch.is_tensor(value) else total.item()
    def gather(self, items):
        """The lists of all processes, joined in the order of their ranks."""
        parts = [items] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, items)
        return sum(parts, [])
    def share(self, n):
        """This process's part of range(n), when results are gathered in order."""
        return range(self.rank * n // self.world, (self.rank + 1) * n // self.world)
    def wrap(self, model):
        """Every forward pass that is trained must go through what this returns: under torchrun it
        makes the backward pass average the gradients over all processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world > 1 else model
    def micro_batches(self, n, *ddp_models):
        """This process's share of a batch of n rows, every world-th of them, as slices of at most
        micro_batch_size rows. The models exchange gradients in the last backward pass only."""
        if n % self.world:
            raise SystemExit(f"{self.world} processes cannot share a batch of {n}: change its size")
        mine = range(self.rank, n, self.world)
        for start in range(0, len(mine), self.config.micro_batch_size):
            piece = mine[start:start + self.config.micro_batch_size]
            for model in ddp_models:  # this is what DDP's no_sync() sets
                model.require_backward_grad_sync = piece[-1] == mine[-1]
            yield slice(piece.start, piece.stop, piece.step)
    def log(self, step, message, **figures):
        """A line for people, and the same figures as a line of log.jsonl."""
        if self.main:
            print(message, flush=True)
            record = dict(stage=self.stage, step=step, seconds=round(time.time() - self.started, 2))
            path = self.path("log.jsonl")
            with writing(path), open(path, "a", encoding="utf-8") as f:
                f.write(json.dumps(record | figures) + "\n")
    def start(self, tokenizer_hash=None, **parts):
        """Begin at step 0, or with --resume at STAGE.last.pt, which is read into the parts (model,
        optimizer, …). Returns that checkpoint, or {}."""
        signal.signal(signal.SIGINT, self.ask_to_stop)
        signal.signal(signal.SIGTERM, self.ask_to_stop)
        checkpoint, earlier = {}, self.path(f"{self.stage}.pt")
        if self.config.resume:
            last = self.path(f"{self.stage}.last.pt")
            checkpoint = load_checkpoint(last, "the stage", tokenizer_hash)
            for part in parts:
                parts[part].load_state_dict(checkpoint[part])
            torch.set_rng_state(checkpoint["random_state"])
            if self.main:
                forget_steps_after(self.path("log.jsonl"), self.stage, checkpoint["step"])
        elif self.main and os.path.exists(earlier):
            os.replace(earlier, self.path(f"{self.stage}.old.pt"))
            print(f"{earlier}, of an earlier run, is now {self.stage}.old.pt")
        self.log(None, f"{self.stage}: {self.device.type}, {str(self.dtype)[6:]} ({self.why}), "
                 f"{self.world} process(es)", config=asdict(self.config))
        return checkpoint
    def ask_to_stop(self, number, frame):
        """Ctrl-C or SIGTERM: stop after the step under way; the second time, at once."""
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True
    def save(self, name, model, step, **more):
        """Write a checkpoint: the weights, what they belong to, and `more`."""
        if self.main:
            contents = dict(model=model.state_dict(), model_config=asdict(model.model.config),
                            step=step, config=asdict(self.config), dtype=str(self.dtype)[6:])
            with replacing(self.path(name), "wb") as f:
                torch.save(contents | more, f)
        self.sum(0.0)  # no process goes on before the file is there
    def save_last(self, due, model, step, **more):
        """Write STAGE.last.pt if it is due; if any process was asked to stop, write it and exit."""
        stop = self.sum(float(self.stop_asked)) > 0
        if due or stop:
            more["random_state"] = torch.get_rng_state()
            self.save(f"{self.stage}.last.pt", model, step, **more)
        if stop:
            command = shlex.join(a for a in sys.argv if a != "--resume")
            self.log(None, f"stopped after step {step}. Continue with: python {command} --resume")
            raise SystemExit(130)

def lock_folder(config):
    """One stage at a time may write into a run folder. The lock ends with the process."""
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        return filelock.FileLock(f"{config.out_dir}/run.lock").acquire(timeout=0).lock
    except OSError as error:  # a filelock.Timeout is one
        raise SystemExit(f"{config.out_dir}: another stage is at work there, or no folder: {error}")

def forget_steps_after(path, stage, step):
    """Take the lines out of the log that a resumed run will write again."""
    with open(path, "a+", encoding="utf-8") as f:
        f.seek(0)
        records = [json.loads(line) for line in f if line.endswith("\n")]  # one may be cut off
    keep = [r for r in records if r["stage"] != stage or (r["step"] or 0) <= step]
    with replacing(path) as f:
        f.writelines(json.dumps(record) + "\n" for record in keep)

@contextmanager
def writing(path):
    """A failure to write `path` ends the program with one line; the half-written .tmp goes."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        if os.path.exists(path + ".tmp"):
            os.remove(path + ".tmp")
        raise SystemExit(f"cannot write {path} (is the disk full?): {str(error).splitlines()[0]}")

@contextmanager
def replacing(path, mode="w"):
    """Open a file for writing that takes its name only when it is whole: killed at any instant, the
    earlier file is there or the new one."""
    text = {} if "b" in mode else dict(encoding="utf-8", errors="replace", newline="\n")
    with writing(path):
        with open(path + ".tmp", mode, **text) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)

def need(path, command):
    """The path, if it is there; else one line that says which command makes it."""
    if not os.path.exists(path):
        raise SystemExit(f"no {path}: run {command} first")
    return path

def load_checkpoint(path, command, tokenizer_hash=None):
    """Read a checkpoint: tensors and plain values only, never code. A damaged one is refused."""
    checkpoint = None
    with suppress(OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error,
                  pickle.UnpicklingError):  # what a file that is none of ours leads to
        if zipfile.ZipFile(need(path, command)).testzip() is None:  # torch.load checks no checksums
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict) or "dtype" not in checkpoint:
        raise SystemExit(f"{path} is damaged, or of another version: make it again with {command}")
    if tokenizer_hash and checkpoint["tokenizer"] != tokenizer_hash:
        raise SystemExit(f"{path} was made with another tokenizer: run {command} again")
    checkpoint["model_config"] = ModelConfig(**checkpoint["model_config"])
    return checkpoint

def restore(cls, checkpoint, device):
    """The model that a checkpoint holds, as a `cls`."""
    model = cls(checkpoint["model_config"])
    model.load_state_dict(checkpoint["model"])
    return model.to(device)
