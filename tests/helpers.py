"""What several files of tests share: small models, float64 everywhere, gradients instead of steps."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from model import ModelConfig, Run
from ppo import PPOConfig


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@contextmanager
def float64():
    """All arithmetic in float64, also where the project goes back to float32 by .float(), as for losses."""
    was = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        del torch.Tensor.float  # the class above has the real one
        torch.set_default_dtype(was)


def tiny(model, seed=0, **shape):
    """A small model with weights large enough to matter."""
    torch.manual_seed(seed)
    config = ModelConfig(**(dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, block_size=32, vocab_size=19)
                            | shape))
    model = model(config)
    with torch.no_grad():
        for p in model.model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return model


class Digits:
    """A tokenizer that knows digits only."""
    end, start, size = 0, 18, 19

    def encode(self, text):
        return [int(c) + 1 for c in text if c.isdigit()]

    def text(self, response):
        return "".join(str(token - 1) for token in response if token != self.end)


def ppo_run(threads=1, **changes):
    """(run, config) of PPO in one process on a CPU, as ppo.py has them."""
    config = PPOConfig(**(dict(device="cpu", dtype="float32", epochs=1, minibatch_size=64, micro_batch_size=64)
                          | changes))
    run = Run(config, "ppo", graceful=False)
    run.threads, run.pool = threads, ThreadPoolExecutor(threads)
    return run, config


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


class Recorder:
    """In place of an optimizer: keeps the gradients of every step, and moves no parameter."""

    def __init__(self, model):
        self.model, self.seen = model, []

    def step(self, factor):
        self.seen.append(gradients(self.model))
        self.model.zero_grad()
