"""How fast the project is, beside nanoGPT, tiktoken and the arithmetic itself. Run by hand, on a machine left alone:

    python tests/bench.py                                      everything, both shapes: about an hour on two cores
    python tests/bench.py pretrain --shape=S --against=PATH    beside the nanoGPT that is checked out at PATH
    python tests/bench.py ppo --peers                          beside trl; generate: also beside Hugging Face's generate
    python tests/bench.py tokenizer --text=FILE                on a text of your own instead of the tiny world's
    python tests/bench.py cost --plot                          … and cost.png, with matplotlib

pretrain    training steps as pretrain.py takes them       generate   64 prompts of 32 tokens, 64 new ones each
ppo         one iteration: rollout, scoring, update         tokenizer  BPE training; encoding beside tiktoken's own
clean       prepare.clean, and MinHash alone                startup    from `python X.py` to its first step
cost        time and memory of a step over model size, context and batch, beside 6·N·T

Shapes: S = 4 layers × 128, context 256, batch 16, vocabulary 2,048 (1.05 M parameters); M = 6 layers × 384, context
256, batch 8, vocabulary 8,192 (13.8 M). Half as many key heads and an MLP three times as wide as the model give a
block the 12·C² weights of nanoGPT's. Tokens are random.

A row is a line of JSON; at the end all are a table. Contenders run in turn, A B C A B C …, each in a process of its
own, as its user runs it, while the others wait; figures are medians over the blocks. `ratio` is the speed over that of
nanoGPT in the same round, else of trl or Hugging Face (all in fp32 and on random weights of the same shape; the latter
two run the very Qwen3), or of tiktoken's own batches. `mfu` is 6·N FLOPs a token and those of attention, over the rate
of a large matrix product of the same precision on all threads; `mfu_fp32` is over that of fp32. `peak_mb` is the peak
memory of the process, PyTorch with it (on CUDA: of the tensors on the GPU). Peers have PyTorch's default threads; the
project computes micro-batches on threads of their own, as Run does.
"""

import argparse
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import ppo as ppo_stage
import prepare
from model import (THREADS, LanguageModel, ModelConfig, Optimizers, Run, ScalarModel, generate, learning_rate_factor,
                   matrix_rate)
from pretrain import PretrainConfig, flops_per_token, get_batch

SHAPES = dict(S=dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_inner=384, block_size=256, vocab_size=2048,
                     batch_size=16),
              M=dict(n_layer=6, n_head=6, n_kv_head=3, n_embd=384, n_inner=1152, block_size=256, vocab_size=8192,
                     batch_size=8))
PROMPTS, PROMPT, NEW = 64, 32, 64  # prompts, their tokens, new tokens
COLUMNS = ("bench", "shape", "variant", "tokens_per_s", "seconds", "rollout_s", "scoring_s", "update_s", "docs_per_s",
           "mb_per_s", "gflop_per_s", "gflop_6nt", "mfu", "mfu_fp32", "ratio", "peak_mb")
HF, TRL = "transformers", "trl"
ROWS = []


def emit(**row):
    """A row as a line of JSON, figures to four digits."""
    ROWS.append({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()})
    print(json.dumps(ROWS[-1], ensure_ascii=False), flush=True)


def print_table():
    columns = [c for c in COLUMNS if any(c in row for row in ROWS)]
    cells = [columns] + [[f"{v:,.0f}" if isinstance(v := row.get(c, ""), float) and v >= 1000 else str(v)
                          for c in columns] for row in ROWS]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(f"{cell:{'<' if c in COLUMNS[:3] else '>'}{w}}"
                        for c, cell, w in zip(columns, line, widths)).rstrip())


def peak_mb():
    """Peak memory of this process. Linux is asked first: getrusage would start a child at its parent's peak."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) * 1024 / 1e6
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


# ---------------------------------------------------------------------------------------------------------------------
# Contenders

@dataclass
class Contender:
    name: str
    call: callable         # one step, generation or iteration
    tokens: int = 0        # of one call
    flops: float = 0.0     # of one token
    parameters: int = 0
    split: dict = field(default_factory=dict)  # seconds of the parts of each call

    def block(self, calls):
        """Seconds a call."""
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls


class Alone:
    """A contender in a process of its own: it finds nobody else's threads, memory or settings."""

    def __init__(self, *job):
        context, self.name = multiprocessing.get_context("spawn"), job[2]
        self.pipe, there = context.Pipe()
        self.process = context.Process(target=self.serve, args=(there, job), daemon=True)
        self.process.start()
        there.close()

    @staticmethod
    def serve(pipe, job):
        contender = make(*job)
        while calls := pipe.recv():
            pipe.send(contender.block(calls))
        split = {part: statistics.median(times[2:]) for part, times in contender.split.items()}
        pipe.send(dict(tokens=contender.tokens, flops=contender.flops, parameters=contender.parameters, split=split,
                       peak_mb=peak_mb()))

    def block(self, calls):
        self.pipe.send(calls)
        return self.pipe.recv()

    def end(self):
        """The figures of the process, which then ends."""
        return SimpleNamespace(**self.block(0))


def make_run(config_class, stage, variant="", **options):
    """The project's Run. It is not entered: no folder is made, nothing is logged, Ctrl-C stops the bench as ever."""
    dtype = dict(bf16="bfloat16", fp32="float32").get(variant[:4], "auto")
    run = Run(config_class(out_dir=os.path.join(tempfile.gettempdir(), "bench"), dtype=dtype, max_new_tokens=NEW,
                           **options), stage)
    return run


@functools.cache
def ceiling(precision):
    """FLOP/s of a large matrix product on all threads."""
    run = make_run(PretrainConfig, "pretrain", precision)
    torch.set_num_threads(THREADS)
    rate = matrix_rate(run.device, run.dtype)
    emit(bench="ceiling", variant=precision, gflop_per_s=rate / 1e9)
    return rate


def model_config(shape):
    return ModelConfig(**{k: v for k, v in shape.items() if k != "batch_size"})


def random_tokens(shape, *size):
    return np.random.default_rng(0).integers(shape["vocab_size"], size=size, dtype=np.uint16)


def records(shape):
    """Prompts for prepare.respond, which then finds each one's ids where it looks for its text; no response ends."""
    prepare.prompt_ids = ppo_stage.prompt_ids = lambda tokenizer, prompt: prompt
    return SimpleNamespace(end=-1), [dict(prompt=p) for p in random_tokens(shape, PROMPTS, PROMPT).tolist()]


def nanogpt(bench, shape, path):
    """nanoGPT's model.py as it stands, in fp32, trained as its train.py does it."""
    spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(path, "model.py"))
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device, T = torch.device("cuda" if torch.cuda.is_available() else "cpu"), shape["block_size"]
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(dropout=0.0, bias=False, **{k: shape[k] for k in keys})).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if bench == "generate":
        prompts = torch.from_numpy(random_tokens(shape, PROMPTS, PROMPT).astype(np.int64)).to(device)
        return Contender("nanoGPT", lambda: model.eval().generate(prompts, NEW), PROMPTS * NEW)
    config, text, steps = SimpleNamespace(seed=1, **shape), random_tokens(shape, 1_000_000), itertools.count()

    def call():
        batch = get_batch(text, next(steps), config).to(device)
        model(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    n = model.get_num_params()
    return Contender("nanoGPT", call, shape["batch_size"] * T,
                     6 * n + 12 * shape["n_layer"] * shape["n_embd"] * T, n)


def qwen3(shape, kind, **more):
    """Hugging Face's Qwen3 of a shape; its last two tokens are padding and end."""
    from transformers import Qwen3Config
    return kind(Qwen3Config(
        vocab_size=shape["vocab_size"], hidden_size=shape["n_embd"], intermediate_size=shape["n_inner"],
        num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"], tie_word_embeddings=True,
        num_key_value_heads=shape["n_kv_head"], head_dim=shape["n_embd"] // shape["n_head"], eos_token_id=None,
        max_position_embeddings=shape["block_size"], pad_token_id=shape["vocab_size"] - 2, **more))


def hugging_face(shape):
    """transformers' generate, with a cache, on the weights of the project's model: the logits are the same."""
    from transformers import Qwen3ForCausalLM
    theirs, own = qwen3(shape, Qwen3ForCausalLM).eval(), LanguageModel(model_config(shape))
    theirs.load_state_dict(own.state_dict())
    prompts = torch.from_numpy(random_tokens(shape, PROMPTS, PROMPT).astype(np.int64))
    with torch.no_grad():
        assert (theirs(prompts).logits - own(prompts)).abs().max() < 1e-4
    options = dict(attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0, max_new_tokens=NEW)
    return Contender(HF, lambda: theirs.generate(prompts, **options), PROMPTS * NEW)


def trl_ppo(shape):
    """An iteration of trl's PPOTrainer, of the sizes of `ppo`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM, Qwen3ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    policy, reference = qwen3(shape, Qwen3ForCausalLM), qwen3(shape, Qwen3ForCausalLM)
    value_model, reward_model = (qwen3(shape, Qwen3ForSequenceClassification, num_labels=1) for _ in range(2))
    vocabulary = {f"t{i}": i for i in range(shape["vocab_size"] - 2)}
    vocabulary |= {"<pad>": len(vocabulary), "<end>": len(vocabulary) + 1}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="t0")),
                                        pad_token="<pad>", eos_token="<end>", padding_side="left")
    words = random_tokens(shape, 2 * PROMPTS, PROMPT).clip(max=len(vocabulary) - 3)
    asked = [dict(input_ids=ids) for ids in words.tolist()]
    config = PPOConfig(output_dir=os.path.join(tempfile.gettempdir(), "bench"), per_device_train_batch_size=16,
                       gradient_accumulation_steps=PROMPTS // 16, num_mini_batches=PROMPTS // 16, num_ppo_epochs=4,
                       response_length=NEW, total_episodes=PROMPTS, num_sample_generations=0, learning_rate=1e-6,
                       temperature=1.0, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                       save_strategy="no", disable_tqdm=True)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = PPOTrainer(config, tokenizer, policy, reference, reward_model, asked, value_model, eval_dataset=asked)

    def call():
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    return Contender(TRL, call, PROMPTS * NEW)


def pretrain(shape, variant):
    """A step exactly as in pretrain.py."""
    run = make_run(PretrainConfig, "pretrain", variant, compile="compile" in variant, max_steps=10**6,
                   micro_batch_size=shape["batch_size"], **shape)
    config = run.config
    model = LanguageModel(model_config(shape)).to(run.device)
    optimizer = Optimizers(model, config.learning_rate, 0.0 if "AdamW" in variant else config.muon_learning_rate,
                           config.weight_decay)
    trained = run.wrap(torch.compile(model) if config.compile else model)
    n_targets, text, steps = config.batch_size * config.block_size, random_tokens(shape, 1_000_000), itertools.count()

    def call():
        step = next(steps)
        batch = get_batch(text, step, config).to(run.device)
        loss = run.backward(trained, config.batch_size, config.micro_batch_size, lambda rows:
                            trained(batch[rows, :-1], batch[rows, 1:]).sum() / n_targets)
        run.update(model, optimizer, loss, step, config,
                   learning_rate_factor(step, config.max_steps, config.warmup_steps))

    n = sum(p.numel() for p in model.parameters())
    assert abs(n / (12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd) - 1) < 0.05  # nanoGPT's
    return Contender(variant, call, n_targets, flops_per_token(model, config.block_size), n)


def generation(shape, variant):
    """model.generate under autocast, or as prepare.respond calls it."""
    run = make_run(PretrainConfig, "pretrain", variant)
    model = LanguageModel(model_config(shape)).to(run.device)
    tokenizer, asked = records(shape)
    prompts, uniforms = [r["prompt"] for r in asked], run.uniforms(PROMPTS, NEW, 1)
    if "respond" in variant:
        return Contender(variant, lambda: prepare.respond(model, tokenizer, asked, run, 1), PROMPTS * NEW)

    def call():
        with run.autocast():
            generate(model, prompts, NEW, -1, uniforms, 1.0)

    return Contender(variant, call, PROMPTS * NEW)


def ppo(shape, variant):
    """An iteration as in ppo.py, with all four models of the whole shape."""
    run = make_run(ppo_stage.PPOConfig, "ppo", variant, batch_size=PROMPTS, minibatch_size=16, epochs=4)
    config, steps, split = run.config, itertools.count(), {}
    policy, reference, value_model, reward_model = (
        kind(model_config(shape)).to(run.device) for kind in (LanguageModel, LanguageModel, ScalarModel, ScalarModel))
    # At random weights there is nothing to learn: a tiny rate keeps every iteration alike.
    optimizers = [Optimizers(m, 1e-6, 0.0, config.weight_decay, (0.9, 0.999), 1e-5) for m in (policy, value_model)]
    tokenizer, asked = records(shape)

    def part(name, function, *arguments):
        start = time.perf_counter()
        result = function(run, config, *arguments)
        split.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def call():
        step = next(steps)
        some = part("rollout_s", ppo_stage.rollout, tokenizer, policy, asked, step)
        rows = part("scoring_s", ppo_stage.score_rollout, tokenizer, (policy, reference, value_model, reward_model),
                    *some)
        part("update_s", ppo_stage.ppo_step, (policy, value_model), optimizers, rows, step, 1.0,
             np.random.default_rng(step), config.kl_coefficient)

    return Contender(variant, call, PROMPTS * NEW, split=split)


def make(bench, shape, variant, against):
    if variant in (HF, TRL):
        return dict(zip((HF, TRL), (hugging_face, trl_ppo)))[variant](shape)
    if variant == "nanoGPT":
        return nanogpt(bench, shape, against)
    return dict(pretrain=pretrain, generate=generation, ppo=ppo)[bench](shape, variant)


def race(contenders, blocks, seconds):
    """Seconds a call in each block, for each: blocks in turn that take about `seconds` for each contender in all."""
    calls, times = [], [[] for _ in contenders]
    for contender in contenders:
        once = contender.block(1)  # slower than later ones
        calls.append(max(1, round(seconds / blocks / contender.block(1))) if once < seconds / blocks else 1)
    for i in list(range(len(contenders))) * blocks:
        times[i].append(contenders[i].block(calls[i]))
    return times


def compete(args):
    """The rows of pretrain, generate or ppo."""
    bench = args.bench
    best = "bf16" if make_run(PretrainConfig, "pretrain").dtype == torch.bfloat16 else "fp32"
    variants = list(dict.fromkeys(["fp32", best]))
    if bench == "generate":
        variants = [v + way for way in ("", ", respond") for v in variants]
    if bench == "pretrain":
        variants += [best + ", AdamW only"] + [best + ", compile"] * args.compile
    if args.against and bench != "ppo":
        variants.insert(0, "nanoGPT")
    if args.peers and bench != "pretrain":
        variants.insert("nanoGPT" in variants, HF if bench == "generate" else TRL)
    ceilings = {v: ceiling("bf16" if v.startswith("bf16") else "fp32") for v in variants if bench == "pretrain"}
    for name in [args.shape] if args.shape else SHAPES:
        contenders = [Alone(bench, SHAPES[name], variant, args.against) for variant in variants]
        times = race(contenders, args.blocks, args.seconds)
        for variant, c, t in zip(variants, [contender.end() for contender in contenders], times):
            s = statistics.median(t)
            row = dict(bench=bench, shape=name, variant=variant, tokens_per_s=c.tokens / s, seconds=s, **c.split)
            if ceilings:
                row.update(mfu=c.flops * c.tokens / s / ceilings[variant],
                           mfu_fp32=c.flops * c.tokens / s / ceiling("fp32"))
            if variants[0] in ("nanoGPT", HF, TRL):
                row["ratio"] = statistics.median(peer / own for peer, own in zip(times[0], t))
            emit(**row, peak_mb=c.peak_mb)


def cost(args):
    """Steps of one model after another, each in a process of its own; one of size, context and batch differs from S."""
    variant = "bf16" if make_run(PretrainConfig, "pretrain").dtype == torch.bfloat16 else "fp32"
    peak = ceiling(variant)

    @functools.cache
    def measure(shape):
        contender = Alone("pretrain", dict(shape), variant, "")
        times, = race([contender], 3, args.seconds / 4)
        return statistics.median(times), contender.end()

    sizes = ((3, 64), (4, 128), (6, 192), (6, 320), (9, 512))
    axes = dict(parameters=[dict(n_layer=n, n_embd=c, n_head=c // 32, n_kv_head=c // 64, n_inner=3 * c)
                            for n, c in sizes],
                context=[dict(block_size=T) for T in (128, 256, 512, 1024)],
                batch=[dict(batch_size=B) for B in (4, 8, 16, 32, 64)])
    for axis, change in ((axis, change) for axis, changes in axes.items() for change in changes):
        shape = SHAPES["S"] | change
        seconds, cell = measure(tuple(shape.items()))
        flop = cell.flops * cell.tokens
        here = dict(parameters=cell.parameters, context=shape["block_size"], batch=shape["batch_size"])
        emit(bench="cost", shape=f"{axis} {here[axis]:,}", variant=variant, tokens_per_s=cell.tokens / seconds,
             seconds=seconds, gflop_6nt=6e-9 * cell.parameters * cell.tokens, mfu=flop / seconds / peak,
             gflop_per_s=flop / seconds / 1e9, peak_mb=cell.peak_mb, axis=axis, **here)
    if args.plot:
        plot([row for row in ROWS if row["bench"] == "cost"], axes, peak / 1e9)


def plot(rows, axes, peak):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("cost.png is not drawn: pip install matplotlib", file=sys.stderr)
    figure = Figure(figsize=(12, 6), layout="constrained")
    for (above, below), axis in zip(figure.subplots(2, len(axes)).T, axes):
        x, seconds, flop, memory = zip(*((r[axis], r["seconds"], r["gflop_6nt"] / peak, r["peak_mb"])
                                         for r in rows if r["axis"] == axis))
        above.loglog(x, seconds, "o-", label="seconds a step")
        above.loglog(x, flop, "--", label="6·N·T at a matrix product's rate")
        below.semilogx(x, memory, "s-", label="peak memory, MB")
        below.set(xlabel=axis, ylim=(0, 1.1 * max(memory)))
        for panel in (above, below):
            panel.minorticks_off()
            panel.set_xticks(x, [f"{v / 1e6:.1f} M" if v > 1e5 else str(v) for v in x])
            panel.legend(loc="lower right")
    figure.savefig("cost.png", dpi=150)
    print("cost.png is written", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Data, and the start of every stage

def pages():
    """(text, label) of one world's pages after another's, 2 MB of each, without end."""
    for seed in itertools.count(1):
        with open("configs/world.toml", "rb") as f:
            rng, world = random.Random(seed), tomllib.load(f)
        yield from prepare.world_documents(world, prepare.make_creatures(world, 16, rng),
                                           prepare.PrepareConfig(megabytes=2.0), set(), rng)


def tokenizer(args):
    """Training, and encoding: by tiktoken alone, and as prepare.py does it until the file is written."""
    texts, size = [], 0
    for text, _ in prepare.read_documents(
            prepare.find_files(args.text, ""), prepare.PrepareConfig(), prepare.Problems()) if args.text else pages():
        if size >= args.megabytes * 1e6:
            break
        texts.append(text[:round(args.megabytes * 1e6) - size])
        size += len(texts[-1].encode())
    tokens = prepare.train_bpe(texts, 4096 - len(prepare.SPECIAL))
    own = prepare.Tokenizer(tokens)

    def encode():
        return own.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    run = make_run(prepare.PrepareConfig, "prepare")
    os.makedirs(run.config.out_dir, exist_ok=True)
    with open(run.path("train.txt.tmp"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(text) + "\n" for text in texts)
    contenders = [Contender(name, call) for name, call in {
        f"train_bpe, {own.size:,} tokens": lambda: prepare.train_bpe(texts, 4096 - len(prepare.SPECIAL)),
        "tiktoken, one by one": lambda: [own.encode(text) for text in texts],
        "tiktoken, all threads": encode,
        "prepare.py, to the file": lambda: prepare.encode_side(run, "train", own, np.uint16)}.items()]
    seconds = list(map(statistics.median, race(contenders, args.blocks, 0)))
    for c, s in zip(contenders, seconds):
        emit(bench="tokenizer", shape=f"{size / 1e6:.1f} MB", variant=c.name, seconds=s, mb_per_s=size / 1e6 / s,
             **(dict(peak_mb=peak_mb()) if "bpe" in c.name else dict(ratio=seconds[2] / s)))


def clean(args):
    documents = list(itertools.islice(pages(), args.documents))
    texts = [prepare.repair(text) for text, _ in documents]

    def near_duplicates():
        near = prepare.NearDuplicates(prepare.PrepareConfig.near_duplicate)
        return [near.seen(s) for some in prepare.batches_of(texts, 2**18) for s in prepare.minhash(some)]

    def clean_on(pool):
        config = prepare.PrepareConfig()
        batches = prepare.batches_of(documents, 2**18, lambda document: len(document[0]))
        inspect = functools.partial(prepare.inspect, config=config)
        return list(prepare.clean(prepare.ahead(pool, inspect, batches) if pool else map(inspect, batches), config, {}))

    pool = ProcessPoolExecutor(os.cpu_count(), initializer=prepare.begin_worker)
    contenders = [Contender("clean, one process", lambda: clean_on(None)),
                  Contender("clean, as prepare.py", lambda: clean_on(pool)),
                  Contender("near duplicates alone", near_duplicates)]
    for c, times in zip(contenders, race(contenders, args.blocks, 0)):
        s = statistics.median(times)
        emit(bench="clean", variant=c.name, docs_per_s=len(documents) / s, seconds=s, peak_mb=peak_mb())


STAGES = {
    "import torch": "", "prepare": "--megabytes=0.15 --vocab_size=512 --n_demonstrations=63 --n_prompts=60 --n_eval=20",
    "pretrain": "--n_layer=2 --n_embd=32 --n_head=2 --n_kv_head=1 --n_inner=64 --max_steps=20 --batch_size=8",
    "sft": "--epochs=1 --batch_size=8", "reward": "--epochs=1 --batch_size=4 --n_reward_layer=1 --n_samples=3",
    "ppo": "--max_steps=1 --batch_size=12 --minibatch_size=6"}


def startup(args):
    """Seconds from the command to the first line that begins with `step`; prepare has no steps: to its end. Each stage
    finishes, as the next one needs its files; reward samples and ranks before its first step."""
    with tempfile.TemporaryDirectory() as folder:
        for stage, options in STAGES.items():
            command, times = ["-c", stage], []
            if options:
                command = [os.path.join(ROOT, f"{stage}.py"), f"--out_dir={folder}", "--max_new_tokens=16"]
            for _ in range(args.blocks):
                start, first = time.perf_counter(), None
                with subprocess.Popen([sys.executable, *command, *options.split()], text=True, encoding="utf-8",
                                      stdout=subprocess.PIPE) as process:
                    for line in process.stdout:
                        first = first or line.startswith("step") and time.perf_counter() - start
                assert process.returncode == 0, f"{stage} has failed"
                times.append(first or time.perf_counter() - start)
            emit(bench="startup", variant=stage, seconds=statistics.median(times))


# ---------------------------------------------------------------------------------------------------------------------

BENCHES = dict(pretrain=compete, generate=compete, ppo=compete, tokenizer=tokenizer, clean=clean, startup=startup,
               cost=cost)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bench", nargs="?", default="all", choices=[*BENCHES, "all"])
    parser.add_argument("--shape", choices=list(SHAPES), help="one shape; default: both")
    parser.add_argument("--against", default="", metavar="PATH", help="a checkout of nanoGPT to compare with")
    parser.add_argument("--peers", action="store_true", help="also transformers and trl, which must be installed")
    parser.add_argument("--seconds", type=float, default=20, help="measured time of a contender, about")
    parser.add_argument("--blocks", type=int, default=5, help="blocks that this time is divided into")
    parser.add_argument("--compile", action="store_true", help="pretrain: also under torch.compile")
    parser.add_argument("--text", default="", help="tokenizer: files to read, a glob")
    parser.add_argument("--megabytes", type=float, default=10, help="tokenizer: of text")
    parser.add_argument("--documents", type=int, default=20_000, help="clean: documents")
    parser.add_argument("--plot", action="store_true", help="cost: write cost.png")
    args = parser.parse_args()
    if args.bench != "all":
        BENCHES[args.bench](args)
        return print_table()
    for bench in BENCHES:  # each in a process of its own: none finds another's threads or memory
        with subprocess.Popen([sys.executable, __file__, bench, *(a for a in sys.argv[1:] if a != "all")], text=True,
                              stdout=subprocess.PIPE, encoding="utf-8") as process:
            for line in process.stdout:
                if line.startswith("{"):
                    emit(**json.loads(line))
    print_table()


if __name__ == "__main__":
    main()
