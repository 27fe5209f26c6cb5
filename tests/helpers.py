"""What several test files share: small models, float64, gradients for steps, a run folder."""

import base64
import sys
from contextlib import contextmanager
from unittest import mock

import torch

import model
import sft
from model import LanguageModel, ModelConfig, Run
from ppo import PPOConfig
from prepare import Tokenizer, write_jsonl

EACH_BYTE = [bytes([b]) for b in range(256)]
BYTES = Tokenizer(EACH_BYTE)  # a tokenizer to which each byte is a token


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@contextmanager
def float64():
    """All arithmetic in float64, also where the scripts go back to float32 by .float()."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        yield
    finally:
        del torch.Tensor.float  # its base class has the real one
        torch.set_default_dtype(default)


def tiny(cls, seed=0, **shape):
    """A small model with weights large enough to matter."""
    torch.manual_seed(seed)
    defaults = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, block_size=32,
                    vocab_size=19)
    made = cls(ModelConfig(**defaults | shape))
    with torch.no_grad():
        for p in made.model.parameters():
            if p.dim() == 2:
                p.mul_(4)
    return made


class Digits:
    """A tokenizer that knows digits only."""
    end, start, size = 0, 18, 19

    def encode(self, text):
        return [int(c) + 1 for c in text if c.isdigit()]

    def text(self, response):
        return "".join(str(token - 1) for token in response if token != self.end)


def one_process(config_class, **options):
    """(run, config) of a stage in one process on a CPU, which leaves the run folder unlocked."""
    config = config_class(**dict(device="cpu", dtype="float32") | options)
    with mock.patch.object(model, "lock_folder"):
        return Run(config), config


def ppo_run(**options):
    """(run, config) of PPO. Unless said otherwise the whole rollout is one minibatch, read once."""
    defaults = dict(epochs=1, minibatch_size=64, micro_batch_size=64)
    return one_process(PPOConfig, **defaults | options)


def gradients(module):
    """All gradients of a model as one vector, 0 where a parameter has none."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in module.parameters()]
    return torch.cat([g.flatten() for g in found])


def exact_gradient(loss, module):
    """The gradient of a loss that the test itself has worked out, in the form of `gradients`."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])


class Recorder:
    """In place of an optimizer: keeps the gradient of every step, and moves no parameter."""

    def __init__(self, module, *rates):
        self.module, self.seen = module, []

    def step(self, factor):
        self.seen.append(gradients(self.module))
        self.module.zero_grad()

    def state_dict(self):
        return {}


def message(role, content):
    return dict(role=role, content=content)


def ranking(id, texts, groups, prompt="Who?"):
    """A line of rankings.jsonl: responses with these texts, ranked in these groups."""
    responses = [dict(text=t, ended=True, tokens=BYTES.encode(t) + [BYTES.end]) for t in texts]
    return dict(id=id, prompt=prompt, responses=responses, ranking=groups, annotator="people")


def write_run_folder(run, answers):
    """What sft.py reads: the byte tokenizer, pretrain.pt, and a demonstration for each answer. One
    more stands first, which is held out for validation. Returns the model of pretrain.pt."""
    if run.main:
        with open(run.path("tokenizer.tiktoken"), "w") as f:
            for rank, token in enumerate(EACH_BYTE):
                f.write(f"{base64.b64encode(token).decode()} {rank}\n")
        write_jsonl(run.path("sft.jsonl"), [
            dict(messages=[message("user", "Hi?"), message("assistant", answer)])
            for answer in ("held out", *answers)])
    parent = tiny(LanguageModel, vocab_size=BYTES.size, block_size=64)
    run.save("pretrain.pt", parent, 1, tokenizer=BYTES.hash)  # processes wait for it
    return parent


def gradients_of_sft(out_dir, **options):
    """Run sft.py's own main() with an optimizer that moves nothing: the gradient of each step."""
    recorders = []

    def recorder(*arguments, dtype):
        recorders.append(Recorder(*arguments))
        return recorders[0]

    options = dict(out_dir=out_dir, device="cpu", dtype="float32", gradient_clip=1e9,
                   val_share=0.001) | options
    argv = ["sft.py"] + [f"--{name}={value}" for name, value in options.items()]
    with (mock.patch.object(sft, "Optimizer", recorder), mock.patch.object(sft, "scorecard"),
          mock.patch.object(model.signal, "signal"), mock.patch.object(sys, "argv", argv)):
        sft.main()
    return recorders[0].seen
