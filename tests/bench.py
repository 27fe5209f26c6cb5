"""How fast the project is, beside nanoGPT, transformers, trl, tiktoken and the arithmetic itself.
Run by hand, on a machine left alone:

    python tests/bench.py                                     everything, both shapes: an hour
    python tests/bench.py pretrain --shape=S --against=PATH   beside the nanoGPT checked out at PATH
    python tests/bench.py ppo --peers                         beside trl
    python tests/bench.py generate --peers                    beside Hugging Face's generate
    python tests/bench.py tokenizer --text=FILE               on your text, not the tiny world's
    python tests/bench.py cost --plot                         also cost.png, with matplotlib

    pretrain    training steps, as in pretrain.py
    generate    64 prompts of 32 tokens, 64 new ones each, by `generate` and by prepare.respond
    ppo         one iteration, as in ppo.py: rollout, scoring, update
    tokenizer   BPE training; encoding beside tiktoken's own
    clean       prepare.clean, and the search for near duplicates alone
    startup     from `python X.py` to its first step
    cost        time and memory of a step over model size, context and batch, beside 6·N·T

Shapes: S = 4 layers × 128 channels, context 256, batch 16, vocabulary 2,048 (1.05 M parameters);
M = 6 layers × 384, context 256, batch 8, vocabulary 8,192 (13.8 M). With half as many key heads and
an MLP three times as wide as the model, a block has the 12·C² weights of nanoGPT's. Tokens are
random.

Each row is printed as a line of JSON, and at the end all of them as a table. Contenders run in
turn, A B C A B C …, while the others wait; a figure is the median over these rounds. Models are
trained and run in a process of their own each, with PyTorch's default number of threads.

`ratio` is a speed over that of the first contender, in the same round: of nanoGPT if it is there,
else of trl or Hugging Face; for the tokenizer, of tiktoken's batches. These peers are in float32
and have random weights of the same shape; the latter two run the very Qwen3. `mfu` is the FLOPs of
a step per second, as flops_per_token counts them, over the rate of a large matrix product in the
same precision; `mfu_fp32` is over the rate in float32. `peak_mb` is the peak memory of the process,
PyTorch with it (on CUDA: of the tensors on the GPU).
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
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import ppo
import prepare
from data.tiny_world import World, make_pages
from model import (LanguageModel, ModelConfig, Optimizer, Run, ScalarModel, clip_gradients,
                   generate, learning_rate_factor, matrix_rate)
from pretrain import PretrainConfig, flops_per_token, get_batch

SHAPES = dict(
    S=dict(n_layer=4, n_head=4, n_kv_head=2, n_embd=128, n_inner=384, block_size=256,
           vocab_size=2048, batch_size=16),
    M=dict(n_layer=6, n_head=6, n_kv_head=3, n_embd=384, n_inner=1152, block_size=256,
           vocab_size=8192, batch_size=8))
PROMPTS, PROMPT, NEW = 64, 32, 64  # prompts, their tokens, new tokens
NO_END = -1                        # in place of <|im_end|>: every response takes its NEW tokens
NANOGPT, HF, TRL = "nanoGPT", "transformers", "trl"
NAMES = ("bench", "shape", "variant")
COLUMNS = (*NAMES, "tokens_per_s", "seconds", "rollout_s", "scoring_s", "update_s", "docs_per_s",
           "mb_per_s", "gflop_per_s", "gflop_6nt", "mfu", "mfu_fp32", "ratio", "peak_mb")
ROWS = []

# --------------------------------------------------------------------------------------------------
# Rows

def emit(**row):
    """Print a row as a line of JSON, its figures to four digits, and keep it for the table."""
    for name, value in row.items():
        if isinstance(value, float):
            row[name] = float(f"{value:.4g}")
    ROWS.append(row)
    print(json.dumps(row, ensure_ascii=False), flush=True)

def as_cell(value):
    return f"{value:,.0f}" if isinstance(value, float) and value >= 1000 else str(value)

def print_table():
    columns = [c for c in COLUMNS if any(c in row for row in ROWS)]
    lines = [columns] + [[as_cell(row.get(c, "")) for c in columns] for row in ROWS]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        cells = [cell.ljust(width) if column in NAMES else cell.rjust(width)
                 for column, cell, width in zip(columns, line, widths)]
        print("  ".join(cells).rstrip())

def peak_mb():
    """Peak memory of this process. On Linux getrusage is no use: it would count the memory of the
    parent that this process was forked from."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 1e6
    if os.path.exists("/proc/self/status"):
        with open("/proc/self/status") as f:
            return int(re.search(r"VmHWM:\s+(\d+)", f.read())[1]) * 1024 / 1e6
    import resource
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6

# --------------------------------------------------------------------------------------------------
# Contenders

@dataclass
class Contender:
    call: callable         # one step, generation or iteration
    tokens: int = 0        # of one call
    flops: float = 0.0     # of one token
    parameters: int = 0
    split: dict = field(default_factory=dict)  # part of a call → its seconds, call by call

    def block(self, calls):
        """Seconds a call."""
        start = time.perf_counter()
        for _ in range(calls):
            self.call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / calls

class Alone:
    """A contender in a process of its own, where nobody else's threads, memory or settings are."""
    def __init__(self, bench, shape, variant, against=""):
        context = multiprocessing.get_context("spawn")
        self.name = variant
        self.pipe, there = context.Pipe()
        job = (there, bench, shape, variant, against)
        context.Process(target=self.serve, args=job, daemon=True).start()
        there.close()

    @staticmethod
    def serve(pipe, bench, shape, variant, against):
        contender = make_contender(bench, shape, variant, against)
        while calls := pipe.recv():
            pipe.send(contender.block(calls))
        split = {part: statistics.median(times[1:]) for part, times in contender.split.items()}
        pipe.send(SimpleNamespace(tokens=contender.tokens, flops=contender.flops,
                                  parameters=contender.parameters, split=split, peak_mb=peak_mb()))

    def block(self, calls):
        try:
            self.pipe.send(calls)
            return self.pipe.recv()
        except (EOFError, ConnectionError):  # the process has printed its traceback, and is gone
            raise SystemExit(f"{self.name} has failed")

    def end(self):
        """The figures of the process, which then ends."""
        return self.block(0)

def make_run(config_class, variant="", **options):
    """The project's Run, in the precision that the variant's name begins with. It makes its folder
    only to lock it; the bench neither logs nor saves."""
    dtype = dict(bf16="bfloat16", fp32="float32").get(variant[:4], "auto")
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as folder:
        return Run(config_class(out_dir=folder, dtype=dtype, max_new_tokens=NEW, **options))

@functools.cache
def best_precision():
    """What the scripts choose on this machine: bf16 or fp32."""
    return "bf16" if make_run(PretrainConfig).dtype == torch.bfloat16 else "fp32"

@functools.cache
def ceiling(precision):
    """FLOP/s of a large matrix product."""
    run = make_run(PretrainConfig, precision)
    rate = matrix_rate(run.device, run.dtype)
    emit(bench="ceiling", variant=precision, gflop_per_s=rate / 1e9)
    return rate

def model_config(shape):
    return ModelConfig(**{name: n for name, n in shape.items() if name != "batch_size"})

def random_tokens(shape, *size):
    return np.random.default_rng(0).integers(shape["vocab_size"], size=size, dtype=np.uint16)

def random_prompts(shape):
    return random_tokens(shape, PROMPTS, PROMPT).tolist()

def records_and_tokenizer(shape):
    """What prepare.respond reads. A record's prompt is a list of ids already, and stays one."""
    prepare.prompt_ids = lambda tokenizer, prompt: prompt
    return [dict(prompt=ids) for ids in random_prompts(shape)], SimpleNamespace(end=NO_END)

# --------------------------------------------------------------------------------------------------
# Contenders: the project

def pretraining(shape, variant):
    """A step as in pretrain.py."""
    run = make_run(PretrainConfig, variant, compile="compile" in variant, max_steps=10**6,
                   micro_batch_size=shape["batch_size"], **shape)
    config = run.config
    model = LanguageModel(model_config(shape)).to(run.device)
    muon_learning_rate = 0.0 if "AdamW" in variant else config.muon_learning_rate
    optimizer = Optimizer(model, config.learning_rate, muon_learning_rate, config.weight_decay,
                          momentum=config.muon_momentum, dtype=run.dtype)
    ddp_model = run.wrap(torch.compile(model, dynamic=False) if config.compile else model)
    n_targets = config.batch_size * config.block_size
    tokens, steps = random_tokens(shape, 1_000_000), itertools.count()

    def call():
        step = next(steps)
        x, y = get_batch(tokens, step, config)                                         # (B, T) both
        loss = 0.0
        for rows in run.micro_batches(config.batch_size, ddp_model):
            inputs, targets = x[rows].to(run.device), y[rows].to(run.device)
            with run.autocast():
                part = ddp_model(inputs, targets, dense=True).sum() / n_targets
            (part * run.world).backward()
            loss += part.detach()
        clip_gradients(model, config.gradient_clip, step)
        optimizer.step(learning_rate_factor(step, config.max_steps, config.warmup_steps))

    n = sum(p.numel() for p in model.parameters())
    n_nanogpt = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    assert abs(n / n_nanogpt - 1) < 0.05
    return Contender(call, n_targets, flops_per_token(model), n)

def generation(shape, variant):
    """The function `generate`, or prepare.respond, which calls it."""
    run = make_run(PretrainConfig, variant)
    model = LanguageModel(model_config(shape)).to(run.device)
    records, tokenizer = records_and_tokenizer(shape)
    prompts, uniforms = random_prompts(shape), torch.rand(PROMPTS, NEW)

    def call_generate():
        with run.evaluating(model):
            generate(model, prompts, NEW, NO_END, uniforms)

    def call_respond():
        prepare.respond(model, tokenizer, records, run, ("bench",))

    return Contender(call_respond if "respond" in variant else call_generate, PROMPTS * NEW)

def ppo_iteration(shape, variant):
    """An iteration as in ppo.py, with all four models of the whole shape."""
    # At random weights there is nothing to learn: a tiny rate keeps every iteration alike.
    run = make_run(ppo.PPOConfig, variant, batch_size=PROMPTS, minibatch_size=16, epochs=4,
                   max_steps=10**6, learning_rate=1e-6, value_learning_rate=1e-6)
    config, steps, split = run.config, itertools.count(), {}
    kinds = (LanguageModel, LanguageModel, ScalarModel, ScalarModel)
    models = [kind(model_config(shape)).to(run.device) for kind in kinds]
    policy, _, value_model, _ = models
    optimizers = [Optimizer(model, rate, config.muon_learning_rate, config.weight_decay,
                            betas=(0.9, 0.999), eps=1e-5)
                  for model, rate in ((policy, config.learning_rate),
                                      (value_model, config.value_learning_rate))]
    ddp_models = run.wrap(policy), run.wrap(value_model)
    prompts = random_prompts(shape)
    records, tokenizer = records_and_tokenizer(shape)

    @contextlib.contextmanager
    def timed(part):
        start = time.perf_counter()
        yield
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        split.setdefault(part, []).append(time.perf_counter() - start)

    def call():
        step = next(steps)
        with timed("rollout_s"):
            responses = prepare.respond(policy, tokenizer, records, run, ("rollout", step),
                                        config.temperature)
        with timed("scoring_s"):
            rollout = ppo.score_rollout(run, config, models, prompts, responses, tokenizer.end)
        with timed("update_s"):
            ppo.update(run, config, ddp_models, optimizers, rollout, step)

    return Contender(call, PROMPTS * NEW, split=split)

# --------------------------------------------------------------------------------------------------
# Contenders: peers

def nanogpt(bench, shape, path):
    """nanoGPT's model.py as it stands, in float32, trained as its train.py does it."""
    spec = importlib.util.spec_from_file_location("nanogpt", os.path.join(path, "model.py"))
    module = sys.modules["nanogpt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
    config = module.GPTConfig(dropout=0.0, bias=False, **{key: shape[key] for key in keys})
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(config).to(device)
        optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    if bench == "generate":
        prompts = torch.tensor(random_prompts(shape), device=device)
        return Contender(lambda: model.eval().generate(prompts, NEW), PROMPTS * NEW)
    tokens, steps = random_tokens(shape, 1_000_000), itertools.count()
    windows = SimpleNamespace(seed=1, **shape)

    def call():
        x, y = get_batch(tokens, next(steps), windows)                                 # (B, T) both
        model(x.contiguous().to(device), y.contiguous().to(device))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    n, T = model.get_num_params(), shape["block_size"]
    flops = 6 * n + 12 * shape["n_layer"] * shape["n_embd"] * T
    return Contender(call, shape["batch_size"] * T, flops, n)

def qwen3(shape, kind, **options):
    """Hugging Face's Qwen3 of a shape. Its last two tokens are padding and end."""
    from transformers import Qwen3Config
    return kind(Qwen3Config(
        vocab_size=shape["vocab_size"], hidden_size=shape["n_embd"],
        intermediate_size=shape["n_inner"], num_hidden_layers=shape["n_layer"],
        num_attention_heads=shape["n_head"], num_key_value_heads=shape["n_kv_head"],
        head_dim=shape["n_embd"] // shape["n_head"], max_position_embeddings=shape["block_size"],
        tie_word_embeddings=True, eos_token_id=None, pad_token_id=shape["vocab_size"] - 2,
        **options))

def hugging_face(shape):
    """transformers' generate, with a cache, on the weights of a model of the project: the logits
    are the same."""
    from transformers import Qwen3ForCausalLM
    theirs, ours = qwen3(shape, Qwen3ForCausalLM).eval(), LanguageModel(model_config(shape))
    theirs.load_state_dict(ours.state_dict())
    prompts = torch.tensor(random_prompts(shape))
    with torch.no_grad():
        assert (theirs(prompts).logits - ours(prompts)).abs().max() < 1e-4
    options = dict(attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                   max_new_tokens=NEW)
    return Contender(lambda: theirs.generate(prompts, **options), PROMPTS * NEW)

def trl_tokenizer(shape):
    """Words t0, t1, … and, as the last two tokens, padding and end."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    n_words = shape["vocab_size"] - 2
    vocabulary = {f"t{i}": i for i in range(n_words)} | {"<pad>": n_words, "<end>": n_words + 1}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>",
                                   padding_side="left")

def trl_ppo(shape):
    """An iteration of trl's PPOTrainer, of the sizes of `ppo_iteration`."""
    from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    policy, reference = qwen3(shape, Qwen3ForCausalLM), qwen3(shape, Qwen3ForCausalLM)
    value_model = qwen3(shape, Qwen3ForSequenceClassification, num_labels=1)
    reward_model = qwen3(shape, Qwen3ForSequenceClassification, num_labels=1)
    words = random_tokens(shape, 2 * PROMPTS, PROMPT).clip(max=shape["vocab_size"] - 3)
    prompts = [dict(input_ids=ids) for ids in words.tolist()]
    config = PPOConfig(
        output_dir=os.path.join(tempfile.gettempdir(), "bench"), per_device_train_batch_size=16,
        gradient_accumulation_steps=PROMPTS // 16, num_mini_batches=PROMPTS // 16,
        num_ppo_epochs=4, response_length=NEW, total_episodes=PROMPTS, num_sample_generations=0,
        learning_rate=1e-6, temperature=1.0, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = PPOTrainer(config, trl_tokenizer(shape), policy, reference, reward_model, prompts,
                             value_model, eval_dataset=prompts)

    def call():
        with contextlib.redirect_stdout(io.StringIO()):
            trainer.train()

    return Contender(call, PROMPTS * NEW)

def make_contender(bench, shape, variant, against):
    if variant == NANOGPT:
        return nanogpt(bench, shape, against)
    if variant == HF:
        return hugging_face(shape)
    if variant == TRL:
        return trl_ppo(shape)
    ours = dict(pretrain=pretraining, generate=generation, ppo=ppo_iteration)
    return ours[bench](shape, variant)

# --------------------------------------------------------------------------------------------------
# The benches of models

def race(contenders, blocks, seconds):
    """For each contender, seconds a call in each block. The blocks are run in turn, and those of a
    contender take about `seconds` together."""
    times, calls = [[] for _ in contenders], []
    for contender in contenders:
        first = contender.block(1)  # slower than later ones
        each = contender.block(1) if first < seconds / blocks else first
        calls.append(max(1, round(seconds / blocks / each)))
    for _ in range(blocks):
        for contender, n, found in zip(contenders, calls, times):
            found.append(contender.block(n))
    return times

def choose_variants(args):
    """The names of the contenders of pretrain, generate or ppo; a peer stands first."""
    best = best_precision()
    variants = ["fp32"] if best == "fp32" else ["fp32", best]
    if args.bench == "generate":
        variants += [f"{precision}, respond" for precision in variants]
    if args.bench == "pretrain":
        variants.append(f"{best}, AdamW only")
        if args.compile:
            variants.append(f"{best}, compile")
    peers = []
    if args.against and args.bench != "ppo":
        peers.append(NANOGPT)
    if args.peers and args.bench != "pretrain":
        peer = HF if args.bench == "generate" else TRL
        if importlib.util.find_spec(peer) is None:
            raise SystemExit(f"--peers: {args.bench} needs {peer}: pip install {peer}")
        peers.append(peer)
    return peers + variants

def compete(args):
    """The rows of pretrain, generate or ppo."""
    variants, ceilings = choose_variants(args), {}
    if args.bench == "pretrain":
        ceilings = {v: ceiling("bf16" if v.startswith("bf16") else "fp32") for v in variants}
    for name in [args.shape] if args.shape else SHAPES:
        contenders = [Alone(args.bench, SHAPES[name], v, args.against) for v in variants]
        times = race(contenders, args.blocks, args.seconds)
        ends = [contender.end() for contender in contenders]
        for variant, contender, found in zip(variants, ends, times):
            seconds = statistics.median(found)
            rate = contender.tokens / seconds
            row = dict(bench=args.bench, shape=name, variant=variant, tokens_per_s=rate,
                       seconds=seconds, **contender.split)
            if ceilings:
                row["mfu"] = contender.flops * rate / ceilings[variant]
                row["mfu_fp32"] = contender.flops * rate / ceiling("fp32")
            if variants[0] in (NANOGPT, HF, TRL):
                row["ratio"] = statistics.median(peer / own for peer, own in zip(times[0], found))
            emit(**row, peak_mb=contender.peak_mb)

AXES = dict(
    parameters=[dict(n_layer=n_layer, n_embd=C, n_head=C // 32, n_kv_head=C // 64, n_inner=3 * C)
                for n_layer, C in ((3, 64), (4, 128), (6, 192), (6, 320), (9, 512))],
    context=[dict(block_size=T) for T in (128, 256, 512, 1024)],
    batch=[dict(batch_size=B) for B in (4, 8, 16, 32, 64)])

def cost(args):
    """Steps of one model after another. Each differs from S in its size, its context or its batch.
    """
    variant = best_precision()
    peak = ceiling(variant)

    @functools.cache
    def measure(shape):  # S itself stands on each axis
        contender = Alone("pretrain", dict(shape), variant)
        times, = race([contender], 3, args.seconds / 4)
        return statistics.median(times), contender.end()

    for axis, changes in AXES.items():
        for change in changes:
            shape = SHAPES["S"] | change
            seconds, step = measure(tuple(shape.items()))
            at = dict(parameters=step.parameters, context=shape["block_size"],
                      batch=shape["batch_size"])
            flop_per_s = step.flops * step.tokens / seconds
            emit(bench="cost", shape=f"{axis} {at[axis]:,}", variant=variant,
                 tokens_per_s=step.tokens / seconds, seconds=seconds,
                 gflop_6nt=6 * step.parameters * step.tokens / 1e9, mfu=flop_per_s / peak,
                 gflop_per_s=flop_per_s / 1e9, peak_mb=step.peak_mb, axis=axis, **at)
    if args.plot:
        plot([row for row in ROWS if row["bench"] == "cost"], peak)

def plot(rows, peak):
    """Draw cost.png: above the seconds of a step, below its memory, over each axis."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("cost.png is not drawn: pip install matplotlib", file=sys.stderr)
        return
    figure = Figure(figsize=(12, 6), layout="constrained")
    for (above, below), axis in zip(figure.subplots(2, len(AXES)).T, AXES):
        points = [row for row in rows if row["axis"] == axis]
        x, memory = [row[axis] for row in points], [row["peak_mb"] for row in points]
        ideal = [row["gflop_6nt"] * 1e9 / peak for row in points]
        above.loglog(x, [row["seconds"] for row in points], "o-", label="seconds a step")
        above.loglog(x, ideal, "--", label="6·N·T at a matrix product's rate")
        below.semilogx(x, memory, "s-", label="peak memory, MB")
        below.set(xlabel=axis, ylim=(0, 1.1 * max(memory)))
        for panel in (above, below):
            panel.minorticks_off()
            panel.set_xticks(x, [f"{n / 1e6:.1f} M" if n > 1e5 else str(n) for n in x])
            panel.legend(loc="lower right")
    figure.savefig("cost.png", dpi=150)
    print("cost.png is written", file=sys.stderr)

# --------------------------------------------------------------------------------------------------
# The benches of data

def pages():
    """The pages of one tiny world after another, without end."""
    for seed in itertools.count(1):
        yield from make_pages(World(seed), reserved=set())

def read_texts(args):
    """Texts of args.megabytes together, and how many bytes they have."""
    if args.text:
        documents = (text for text, _ in prepare.read_documents(prepare.find_files(args.text)))
    else:
        documents = (page["text"] for page in pages())
    texts, size, wanted = [], 0, round(args.megabytes * 1e6)
    for text in documents:
        texts.append(text[:wanted - size])
        size += len(texts[-1].encode())
        if size >= wanted:
            break
    return texts, size

def tokenizer(args):
    """Training; and encoding, by tiktoken alone, and as prepare.py does it, into files."""
    texts, size = read_texts(args)
    n_tokens = 4096 - len(prepare.SPECIAL)
    trained = prepare.Tokenizer(prepare.train_bpe(texts, n_tokens))
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        config, kept_path = prepare.PrepareConfig(out_dir=folder), os.path.join(folder, "kept.tmp")
        with open(kept_path, "w", encoding="utf-8") as f:
            f.writelines(json.dumps(text) + "\n" for text in texts)

        def train():
            prepare.train_bpe(texts, n_tokens)

        def encode_one_by_one():
            for text in texts:
                trained.encode(text)

        def encode_batch():
            trained.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

        def encode_into_files():
            prepare.encode_files(config, kept_path, trained)

        calls = (train, encode_one_by_one, encode_batch, encode_into_files)
        times = race([Contender(call) for call in calls], args.blocks, 0)
    names = (f"train_bpe, {trained.size:,} tokens", "tiktoken, one by one",
             "tiktoken, all threads", "prepare.py, to the file")
    for call, name, found in zip(calls, names, times):
        seconds = statistics.median(found)
        row = dict(bench="tokenizer", shape=f"{size / 1e6:.1f} MB", variant=name, seconds=seconds,
                   mb_per_s=size / 1e6 / seconds)
        if call is train:
            row["peak_mb"] = peak_mb()
        else:
            batch = times[calls.index(encode_batch)]
            row["ratio"] = statistics.median(peer / own for peer, own in zip(batch, found))
        emit(**row)

class ThisProcess:
    """In place of multiprocessing.Pool: its map is computed in this process."""
    def __init__(self, initializer):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def map(self, function, items, chunksize):
        return [function(item) for item in items]

def clean(args):
    """All rules, in one process and in as many as prepare.py takes; and near duplicates alone."""
    config = prepare.PrepareConfig()
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        path = os.path.join(folder, "pages.jsonl")
        prepare.write_jsonl(path, itertools.islice(pages(), args.documents))
        texts = [prepare.repair(text) for text, _ in prepare.read_documents([path])]

        def clean_as_prepare():
            with open(os.devnull, "w") as kept_file:
                prepare.clean([path], config, kept_file)

        def clean_in_one_process():
            with mock.patch.object(multiprocessing, "Pool", ThisProcess):
                clean_as_prepare()

        def find_near_duplicates():
            near = prepare.NearDuplicates(len(texts), config.near_duplicate)
            for text in texts:
                near.seen(prepare.minhash(text))

        calls = (clean_in_one_process, clean_as_prepare, find_near_duplicates)
        times = race([Contender(call) for call in calls], args.blocks, 0)
    names = ("clean, one process", "clean, as prepare.py", "near duplicates alone")
    for name, found in zip(names, times):
        seconds = statistics.median(found)
        emit(bench="clean", variant=name, docs_per_s=len(texts) / seconds, seconds=seconds,
             peak_mb=peak_mb())

# --------------------------------------------------------------------------------------------------
# The start of every stage

WORLD = "[numbers]\nmegabytes = 0.15\ndemonstrations = 63\nprompts = 60\neval = 20\n"
STAGES = dict(
    prepare="--vocab_size=512",
    pretrain="--n_layer=2 --n_embd=32 --n_head=2 --n_kv_head=1 --n_inner=64 --max_steps=20 "
             "--batch_size=8",
    sft="--epochs=1 --batch_size=8",
    reward="--epochs=1 --batch_size=4 --n_reward_layer=1 --n_samples=3",
    ppo="--max_steps=1 --batch_size=12 --minibatch_size=6")

def seconds_to_first_step(*arguments):
    """Seconds from the command to its first line that begins with `step`; without one, to its end.
    The command then runs to its end, as the next stage needs its files."""
    start, first = time.perf_counter(), None
    with subprocess.Popen([sys.executable, *arguments], text=True, encoding="utf-8",
                          stdout=subprocess.PIPE) as process:
        for line in process.stdout:
            if first is None and line.startswith("step"):
                first = time.perf_counter() - start
    assert process.returncode == 0, f"{arguments[0]} has failed"
    return first or time.perf_counter() - start

def startup(args):
    """Each stage until its first step. prepare has no steps, so all of it; reward samples and ranks
    before its first step."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        world = os.path.join(folder, "world.toml")
        with open(world, "w", encoding="utf-8") as f:
            f.write(WORLD)
        commands = {"import torch": ["-c", "import torch"]}
        for stage, options in STAGES.items():
            commands[stage] = [os.path.join(ROOT, f"{stage}.py"), f"--out_dir={folder}/run",
                               "--max_new_tokens=16", *options.split()]
        commands["prepare"].append(f"--world={world}")
        for name, command in commands.items():
            times = [seconds_to_first_step(*command) for _ in range(args.blocks)]
            emit(bench="startup", variant=name, seconds=statistics.median(times))

# --------------------------------------------------------------------------------------------------

BENCHES = dict(pretrain=compete, generate=compete, ppo=compete, tokenizer=tokenizer, clean=clean,
               startup=startup, cost=cost)

def read_options():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("bench", nargs="?", default="all", choices=[*BENCHES, "all"])
    add("--shape", choices=list(SHAPES), help="one shape; default: both")
    add("--against", default="", metavar="PATH", help="a checkout of nanoGPT to compare with")
    add("--peers", action="store_true", help="also transformers and trl, which must be installed")
    add("--seconds", type=float, default=20, help="measured time of a contender, about")
    add("--blocks", type=int, default=5, help="blocks that this time is divided into")
    add("--compile", action="store_true", help="pretrain: also under torch.compile")
    add("--text", default="", help="tokenizer: files to read, as of prepare.py")
    add("--megabytes", type=float, default=10, help="tokenizer: of text")
    add("--documents", type=int, default=20_000, help="clean: documents")
    add("--plot", action="store_true", help="cost: write cost.png")
    args = parser.parse_args()
    if args.against and not os.path.exists(os.path.join(args.against, "model.py")):
        parser.error(f"--against={args.against}: no model.py there; git clone nanoGPT first")
    return args

def main():
    args = read_options()
    if args.bench != "all":
        BENCHES[args.bench](args)
    else:  # each bench in a process of its own: none finds another's threads or memory
        options = [argument for argument in sys.argv[1:] if argument != "all"]
        for bench in BENCHES:
            command = [sys.executable, __file__, bench, *options]
            with subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                  encoding="utf-8") as process:
                for line in process.stdout:
                    if line.startswith("{"):
                        emit(**json.loads(line))
    print_table()

if __name__ == "__main__":
    main()
