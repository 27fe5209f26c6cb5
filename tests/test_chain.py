"""The whole chain as a user runs it: the scripts as processes, at a miniature size, in a folder of their own."""

import ast
import dataclasses
import importlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
import torch

from model import ModelConfig, RunConfig, load_config
from prepare import load_tokenizer, read_jsonl

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("prepare", "model", "pretrain", "sft", "reward", "ppo", "sample")
HAS_SAMPLE = (ROOT / "sample.py").exists()
needs_sample = pytest.mark.skipif(not HAS_SAMPLE, reason="there is no sample.py")

SHAPE = "--n_layer=2 --n_embd=32 --n_head=2 --n_kv_head=1 --n_inner=64 --block_size=256".split()
OPTIONS = {
    "prepare": ("--megabytes=0.15 --vocab_size=512 --n_demonstrations=63 --n_prompts=60 --compare_share=0.7 "
                "--n_eval=20").split(),
    "pretrain": [*SHAPE, *"--max_steps=40 --eval_every=15 --batch_size=8 --micro_batch_size=4".split()],
    "sft": "--epochs=5 --batch_size=8".split(),
    "reward": "--epochs=3 --batch_size=4 --n_reward_layer=1 --n_samples=3".split(),
    "ppo": "--max_steps=6 --batch_size=12 --minibatch_size=6 --epochs=2 --save_every=4".split(),
    "sample": ["--compare"],
}
PREPARED = ("tokenizer.tiktoken", "train.bin", "val.bin", "data.json", "sft.jsonl", "prompts.jsonl", "eval.jsonl")
CHECKPOINTS = ("pretrain.pt", "sft.pt", "reward.pt", "ppo.pt")
INPUTS = {"pretrain": PREPARED, "sft": (*PREPARED, "pretrain.pt"), "reward": (*PREPARED, "sft.pt"),
          "ppo": (*PREPARED, "sft.pt", "reward.pt")}
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | dict(
    OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8")
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT, env=ENVIRONMENT)


def command(script, out_dir, *options, python=(sys.executable,)):
    shared = [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", "--max_new_tokens=16"]
    return [*python, f"{script}.py", *shared, *options]


def finish(arguments, typed=""):
    """Run a command to its end; one that hangs is killed with all the processes that it has started.

    typed: what it finds on its standard input, before the end of file."""
    process = subprocess.Popen(arguments, start_new_session=True, stdin=subprocess.PIPE, **PIPES)
    try:
        stdout, stderr = process.communicate(typed, timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
        pytest.fail(f"{shlex.join(map(str, arguments))} did not end within a minute")
    return subprocess.CompletedProcess(arguments, process.returncode, stdout, stderr)


def run(script, out_dir, *options, **more):
    """A script as a user runs it; returns the finished process."""
    return finish(command(script, out_dir, *options, **more))


def succeed(script, out_dir, *options, **more):
    done = run(script, out_dir, *options, **more)
    assert done.returncode == 0, f"{script}.py\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done


def fail(script, out_dir, *options):
    """The one line on stderr in which a mistake of the user's ends."""
    done = run(script, out_dir, *options)
    assert done.returncode != 0, done.stdout[-1500:]
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stderr.strip()


def copy(folder, to, names):
    to.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(folder / name, to / name)
    return to


def load(path):
    return torch.load(path, weights_only=True)


def read_log(folder, stage, name):
    """{step: figure} of a stage in log.jsonl."""
    lines = read_jsonl(folder / "log.jsonl")
    return {r["step"]: r[name] for r in lines if r["stage"] == stage and r.get("step") and name in r}


def assert_identical(a, b, where):
    """Bit for bit the same tensors, numbers and structure."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_identical(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b)):
            assert_identical(*pair, f"{where}[{i}]")
    elif torch.is_tensor(a):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The run folder after the whole chain; the tests copy what they need from it and leave it as it is."""
    out_dir = tmp_path_factory.mktemp("chain") / "out"
    for script, options in OPTIONS.items():
        if script != "sample" or HAS_SAMPLE:
            succeed(script, out_dir, *options)
    return out_dir


# ---------------------------------------------------------------------------------------------------------------------
# What the chain leaves behind

def test_every_file_is_there(folder):
    """All files of the run folder's table exist, are not empty, and no temporary file is left over."""
    wanted = {*PREPARED, *CHECKPOINTS, "samples.jsonl", "rankings.jsonl", "log.jsonl", "scorecard.json"}
    found = {path.name for path in folder.iterdir() if path.stat().st_size}
    assert wanted <= found, wanted - found
    assert not [name for name in found if name.endswith(".tmp") or ".1." in name]


@needs_sample
def test_report_is_there(folder):
    """sample.py --compare has written the report: one page of HTML, with every stage in it."""
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.lower().startswith("<!doctype html")
    assert all(stage in html for stage in ("pretrain", "sft", "reward", "ppo"))


@needs_sample
def test_sample_answers_a_prompt(folder, tmp_path):
    """sample.py --prompt answers with the last stage's model."""
    names = [*PREPARED, *CHECKPOINTS, "log.jsonl", "scorecard.json"]
    answer = succeed("sample", copy(folder, tmp_path / "out", names), "--prompt=Where does Milo live?")
    assert answer.stdout.strip() and not answer.stderr


@needs_sample
@pytest.mark.parametrize("typed, replies", [("", 0), ("Where does Milo live?\n\nHello", 2),
                                            ("猫はどこ? مرحبا 🐈\n", 1), ("live " * 5000 + "\nHello\n", 1)])
def test_chat_until_the_end_of_file(folder, tmp_path, typed, replies):
    """A chat answers each message, in any script, refuses one that outgrows the context, and ends with the input."""
    out_dir = copy(folder, tmp_path / "out", [*PREPARED, *CHECKPOINTS, "log.jsonl", "scorecard.json"])
    done = finish(command("sample", out_dir), typed)
    assert done.returncode == 0 and not done.stderr, done.stderr[-3000:]
    assert done.stdout.count("model> ") == replies
    assert ("say it shorter" in done.stdout) == (len(typed) > 1000)


@pytest.mark.skipif(sys.platform == "win32", reason="no bash")
def test_input_that_is_no_text(folder, tmp_path):
    """Bytes that are no UTF-8, as of a line that the terminal has cut off, are answered like anything else."""
    out_dir = copy(folder, tmp_path / "out", [*PREPARED, *CHECKPOINTS, "log.jsonl", "scorecard.json"])
    done = finish(["bash", "-c", "printf '\\xe4 Milo\\n' | \"$@\"", "bash", *command("sample", out_dir)])
    assert done.returncode == 0 and not done.stderr and done.stdout.count("model> ") == 1, done.stderr[-3000:]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints_are_plain_dicts(folder, name):
    """A checkpoint loads without unpickling code, says what it is, and was made with this folder's tokenizer."""
    checkpoint = load(folder / name)
    assert {"model", "model_config", "config", "step", "optimizer", "random_state", "best", "tokenizer",
            "parent"} <= checkpoint.keys()
    assert checkpoint["tokenizer"] == load_tokenizer(folder).hash
    assert checkpoint["tokenizer"] == json.loads((folder / "data.json").read_text(encoding="utf-8"))["tokenizer"]
    assert all(tensor.isfinite().all() for tensor in checkpoint["model"].values())
    config = ModelConfig(**checkpoint["model_config"])
    assert config.n_layer == (1 if name == "reward.pt" else 2) and config.n_embd == 32 and config.vocab_size == 512
    assert checkpoint["step"] > 0 and checkpoint["config"]["out_dir"] == str(folder)
    parents = dict(pretrain="train.bin", sft="pretrain.pt", reward="sft.pt", ppo="sft.pt")
    assert checkpoint["parent"].endswith(parents[name.removesuffix(".pt")])


def test_stages_change_the_model(folder):
    """Each stage really trains: its weights are not its parent's, and the trunk of the reward model has moved too."""
    models = {name: load(folder / name)["model"] for name in CHECKPOINTS}
    for a, b in (("pretrain.pt", "sft.pt"), ("sft.pt", "ppo.pt"), ("sft.pt", "reward.pt")):
        for name in models[a].keys() & models[b].keys():
            assert not torch.equal(models[a][name], models[b][name]), (a, b, name)


def test_log_is_whole_lines_of_json(folder):
    """Every line is one JSON object with its stage; every stage has logged its config and, in training, its steps."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {"prepare", "pretrain", "sft", "reward", "ppo"} <= {line["stage"] for line in lines}
    for stage in ("prepare", "pretrain", "sft", "reward", "ppo"):
        mine = [line for line in lines if line["stage"] == stage]
        assert mine[0]["config"]["seed"] == 1 and mine[0]["config"]["out_dir"] == str(folder)
        steps = [line["step"] for line in mine if line.get("step") is not None]
        assert steps == sorted(steps) and (steps or stage == "prepare")
    losses = read_log(folder, "pretrain", "loss")
    assert losses[40] < losses[1] - 0.5
    numbers = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert all(map(math.isfinite, numbers))


def test_scorecard_of_every_stage(folder):
    """Every stage has filed finite numbers, and means over prompts come with their standard error and count."""
    card = json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    assert {"prepare", "pretrain", "sft", "reward", "ppo"} <= card.keys()
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert all(math.isfinite(v) for v in card[stage].values() if isinstance(v, (int, float))), stage
        assert card[stage]["n"] > 0 and card[stage]["seconds"] > 0
    for stage in ("pretrain", "sft", "ppo"):
        for name in ("knowledge", "instruction", "safety", "gold"):
            assert name in card[stage] and 0 <= card[stage][name + "_se"] < 1, (stage, name)
        assert 0 < card[stage]["bits_per_byte"] < 8 and card[stage]["n"] == 20


def test_samples_and_rankings(folder):
    """Every prompt kept for comparisons was sampled and ranked; a ranking names each response once."""
    prompts, samples, rankings = (read_jsonl(folder / f"{name}.jsonl") for name in ("prompts", "samples", "rankings"))
    compared = [p["id"] for p in prompts if p["use"] == "compare"]
    assert len(compared) == 42 and compared == [s["id"] for s in samples] == [r["id"] for r in rankings]
    for sample, ranking in zip(samples, rankings):
        assert 1 <= len(sample["responses"]) <= 3 and ranking["responses"] == sample["responses"]
        assert sorted(i for group in ranking["ranking"] for i in group) == list(range(len(sample["responses"])))


# ---------------------------------------------------------------------------------------------------------------------
# Stop and resume

@pytest.fixture(scope="module", params=["pretrain", "sft", "reward", "ppo"])
def interrupted(request, folder, tmp_path_factory):
    """A stage stopped by Ctrl-C after its first step, then continued with the command that it printed."""
    if sys.platform == "win32":
        pytest.skip("no SIGINT for another process on Windows")
    stage = request.param
    out_dir = copy(folder, tmp_path_factory.mktemp("resume") / "out", INPUTS[stage])
    process = subprocess.Popen(command(stage, out_dir, *OPTIONS[stage]), **PIPES)
    timer = threading.Timer(60, process.kill)
    timer.start()
    lines = []
    for line in process.stdout:
        if line.startswith("step ") and not any(l.startswith("step ") for l in lines):
            process.send_signal(signal.SIGINT)
        lines.append(line)
    errors = process.stderr.read()
    stopped = dict(status=process.wait(), lines=lines, errors=errors, checkpoint=load(out_dir / f"{stage}.last.pt"))
    timer.cancel()
    words = shlex.split(lines[-1].partition("Continue with: python ")[2])
    stopped["resumed"] = finish([sys.executable, *words])
    return stage, out_dir, stopped


def test_interrupted_run_says_how_to_continue(interrupted):
    """Ctrl-C saves, ends with a status other than 0, without a traceback, and with the command that continues."""
    stage, out_dir, stopped = interrupted
    assert stopped["status"] == 128 + signal.SIGINT and stopped["errors"] == ""
    assert stopped["lines"][-1].startswith("stopped") and f"--out_dir={out_dir}" in stopped["lines"][-1]
    assert stopped["lines"][-1].rstrip().endswith("--resume")
    assert stopped["checkpoint"]["step"] >= 1


def test_resume_is_bit_exact(interrupted, folder):
    """Stopped midway and resumed, a stage ends with the very weights and optimizer of the run that went through."""
    stage, out_dir, stopped = interrupted
    assert stopped["resumed"].returncode == 0, stopped["resumed"].stderr[-3000:]
    for name in (f"{stage}.last.pt", f"{stage}.pt"):
        through, resumed = load(folder / name), load(out_dir / name)
        assert stopped["checkpoint"]["step"] < through["step"]  # it really was stopped midway
        for key in through.keys() - {"config", "random_state"}:
            assert_identical(through[key], resumed[key], f"{name}: {key}")


def test_stopping_does_not_choose_the_best_model(interrupted, folder):
    """Where a run happened to be stopped has no say in which model is the best: only the regular evaluations have."""
    stage, _, stopped = interrupted
    if stage in ("pretrain", "sft"):
        figures = read_log(folder, stage, dict(pretrain="bits_per_byte", sft="val_loss")[stage])
        regular = [v for step, v in figures.items() if step <= stopped["checkpoint"]["step"]]
        assert stopped["checkpoint"]["best"] == min(regular, default=math.inf)


@pytest.mark.parametrize("stage", ["reward", "ppo"])
def test_resume_after_the_last_step(folder, tmp_path, stage):
    """Killed between the last step and the end, a stage still finishes with --resume, and writes the same model."""
    out_dir = copy(folder, tmp_path / "out", {*INPUTS[stage], f"{stage}.last.pt", "samples.jsonl", "rankings.jsonl"})
    succeed(stage, out_dir, *OPTIONS[stage], *["--steps=train"] * (stage == "reward"), "--resume")
    assert_identical(load(folder / f"{stage}.pt")["model"], load(out_dir / f"{stage}.pt")["model"], stage)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes

needs_torchrun = pytest.mark.skipif(sys.platform == "win32", reason="torchrun's rendezvous needs libuv, which Windows "
                                    "wheels lack")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@needs_torchrun
@pytest.mark.parametrize("stage, figures", [
    ("pretrain", ("loss", "gradient_norm", "bits_per_byte")), ("sft", ("loss", "val_loss")),
    ("reward", ("loss", "accuracy")),
    ("ppo", ("reward", "gold", "kl", "entropy", "policy_loss", "value_loss", "clip_fraction", "length"))])
def test_two_processes_equal_one(folder, tmp_path, stage, figures):
    """torchrun with two gloo processes: the figures of one process to 1e-4, its weights to 1e-3, and, where a stage
    samples, its responses word for word; nothing is overwritten.

    SFT's last batch of an epoch holds one conversation (57 = 7·8 + 1), so that a process has nothing to compute.
    Catches a forward pass beside the DDP wrapper, means of means, whitening by rank, random numbers of a rank's own."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS[stage], f"{stage}.pt"))
    done = succeed(stage, out_dir, *OPTIONS[stage], python=TORCHRUN)
    assert "2 process" in done.stdout and (stage != "sft" or "57 conversations" in done.stdout)
    for figure in figures:
        one, two = read_log(folder, stage, figure), read_log(out_dir, stage, figure)
        assert one.keys() == two.keys() and one
        for step in one:
            assert two[step] == pytest.approx(one[step], abs=1e-4), (figure, step)
    if stage == "reward":
        for name in ("samples.jsonl", "rank.html"):
            assert (out_dir / name).read_bytes() == (folder / name).read_bytes(), name
    one, two = load(folder / f"{stage}.pt")["model"], load(out_dir / f"{stage}.pt")["model"]
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=1e-3, msg=key)
    assert (out_dir / f"{stage}.1.pt").read_bytes() == (folder / f"{stage}.pt").read_bytes()


@needs_torchrun
def test_gradients_of_two_processes_equal_one(tmp_path):
    """In float64, two processes have the gradients of one to 1e-12, in SFT, reward model, policy and value function,
    with shares of unequal size and unequal numbers of tokens (catches means of the processes' means, advantages or
    rewards whitened by rank, gradients that are not exchanged)."""
    found = []
    for python in ([sys.executable], TORCHRUN):
        path = tmp_path / f"{len(python)}.pt"
        done = finish([*python, str(ROOT / "tests/update.py"), str(path)])
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(load(path))
    assert found[0].keys() == {"sft", "reward", "policy", "value"}
    for name, one in found[0].items():
        assert one.dtype == torch.float64 and one.abs().max() > 1e-3
        torch.testing.assert_close(found[1][name], one, rtol=0, atol=1e-12, msg=name)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("script, present, options, remedy", [
    ("pretrain", (), (), "prepare.py"), ("sft", PREPARED, (), "pretrain.py"), ("reward", PREPARED, (), "sft.py"),
    ("reward", (*PREPARED, "sft.pt"), ("--steps=train",), "reward.py"),
    ("ppo", PREPARED, (), "sft.py"), ("ppo", (*PREPARED, "sft.pt"), (), "reward.py"),
    pytest.param("sample", (), (), "prepare.py", marks=needs_sample)])
def test_missing_input_names_its_command(folder, tmp_path, script, present, options, remedy):
    """Where an input is missing, one line names it and the command that makes it."""
    message = fail(script, copy(folder, tmp_path / "out", present), *options)
    assert message.startswith("no ") and f"run python {remedy}" in message and message.endswith("first")


@pytest.mark.parametrize("script, option, words", [
    ("pretrain", "--lerning_rate=1", ("--lerning_rate", "learning_rate?")),
    ("sft", "--epochs=many", ("--epochs", "int", "many")),
    ("pretrain", "--n_head=3", ("n_head=3", "n_embd")),
    ("ppo", "--batch_size=0", ("--batch_size", "at least 1")),
    ("prepare", "--fields=question", ("--fields=question", "prompt,response")),
    ("prepare", "--demonstrations=pairs.jsonl", ("--demonstrations", "--text")),
    ("prepare", "--separator=a\nb", ("--separator", "blank lines")),
    ("reward", "--config=nowhere.toml", ("nowhere.toml",))])
def test_wrong_options(tmp_path, script, option, words):
    """A wrong option is named with what would be right, and nothing is written."""
    message = fail(script, tmp_path / "out", option)
    assert all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old, new, word", [
    ("[judge]", "[jugde]", "judge"), ("{who}", "{woh}", "woh"), ("[web]", "[wep]", "web"),
    ("names   = [", "names = 3 # [", ""), ("names   = [", 'names = ["A"]\nothers = [', "")])
def test_world_that_lacks_something(tmp_path, old, new, word):
    """A student's edit of the world file that breaks it is one line that names the file."""
    with open(ROOT / "configs/world.toml", encoding="utf-8") as f:
        world = f.read()
    assert old in world
    (tmp_path / "w.toml").write_text(world.replace(old, new), encoding="utf-8")
    message = fail("prepare", tmp_path / "out", *OPTIONS["prepare"], f"--world={tmp_path / 'w.toml'}")
    assert "w.toml" in message and word in message


def test_text_that_the_rules_do_not_fit(tmp_path):
    """Text of another language than English loses nearly all: the message names the rule and the way out."""
    lines = "\n\n".join(f"Der Fuchs Nummer {i} wohnt im alten Turm am Fluss neben der Burg." for i in range(40))
    (tmp_path / "de.txt").write_text(lines)
    options = ["--separator=", f"--text={tmp_path}/de.txt", "--vocab_size=300", "--near_duplicate=1", "--val_share=0.3"]
    message = fail("prepare", tmp_path / "out", *options)
    assert "not language" in message and "--cleaning=false" in message
    succeed("prepare", tmp_path / "out", *options, "--cleaning=false")


@pytest.mark.parametrize("present, options, words", [
    ((*PREPARED, *CHECKPOINTS), ("--checkpoint=reward", "--prompt=Why?"), ("reward.pt", "no language model", "sft")),
    ((*PREPARED, "sft.pt"), ("--compare", "--best_of=2"), ("reward.pt", "python reward.py")),
    ((*PREPARED, "pretrain.pt", "reward.pt"), ("--compare", "--best_of=2"), ("sft.pt", "python sft.py"))])
def test_models_that_do_not_fit(folder, tmp_path, present, options, words):
    """sample.py names the model that is missing, or is none of language."""
    message = fail("sample", copy(folder, tmp_path / "out", present), *options)
    assert all(word in message for word in words), message


def test_run_folder_that_is_none(tmp_path):
    """A file in the place of the run folder is named, and left as it is."""
    (tmp_path / "out").write_text("mine")
    assert str(tmp_path / "out") in fail("prepare", tmp_path / "out") and (tmp_path / "out").read_text() == "mine"


def test_no_demonstrations(folder, tmp_path):
    """Without a demonstration sft.py says what is missing, not that the context is short."""
    out_dir = copy(folder, tmp_path / "out", (*PREPARED, "pretrain.pt"))
    (out_dir / "sft.jsonl").write_text("")
    assert "--demonstrations" in fail("sft", out_dir)


def test_wrong_key_in_a_config_file(tmp_path):
    """A wrong key in a config file is named with the file, the table and the closest valid name."""
    (tmp_path / "c.toml").write_text('seed = 3\n[sft]\nepoch = 3\n')
    message = fail("sft", tmp_path / "out", f"--config={tmp_path / 'c.toml'}")
    assert "c.toml" in message and "epoch" in message and "[sft]" in message and "did you mean epochs?" in message


def test_second_run_of_prepare_keeps_the_first(folder, tmp_path):
    """Another seed overwrites nothing: the earlier files are there under numbered names; and then the old checkpoint
    and the old data are refused, because they belong to another tokenizer."""
    out_dir = copy(folder, tmp_path / "out", (*PREPARED, "pretrain.pt"))
    (out_dir / "comparisons.jsonl").write_text("of the first\n")
    succeed("prepare", out_dir, *OPTIONS["prepare"], "--seed=2")
    assert (out_dir / "comparisons.1.jsonl").read_text() == "of the first\n" and not (out_dir / "comparisons.jsonl").exists()
    for name in PREPARED:
        stem, ext = name.rsplit(".", 1)
        assert (out_dir / f"{stem}.1.{ext}").read_bytes() == (folder / name).read_bytes(), name
        assert (out_dir / name).read_bytes() != (folder / name).read_bytes(), name
    message = fail("sft", out_dir)
    assert "pretrain.pt" in message and "another tokenizer" in message and "pretrain.py" in message
    assert not [path for path in out_dir.iterdir() if path.name.endswith(".tmp")]


def test_terminal_without_the_letters():
    """A terminal that knows ASCII only is no reason to stop (catches arrows in the help)."""
    done = subprocess.run([sys.executable, "prepare.py", "--help"], capture_output=True, cwd=ROOT,
                          env=ENVIRONMENT | dict(PYTHONIOENCODING="ascii"))
    assert done.returncode == 0 and b"--near_duplicate" in done.stdout


def test_overoptimisation_needs_rubrics(folder, tmp_path):
    """Without a rubric there is no gold score, and that is what is said."""
    out_dir = copy(folder, tmp_path / "out", (*PREPARED, "sft.pt"))
    (out_dir / "eval.jsonl").write_text("")
    assert "rubric" in fail("sample", out_dir, "--overoptimize=weak")


def test_data_of_another_tokenizer_is_refused(folder, tmp_path):
    """Token ids mean nothing to another tokenizer: train.bin and tokenizer.tiktoken must be of one run."""
    out_dir = copy(folder, tmp_path / "out", PREPARED)
    lines = (out_dir / "tokenizer.tiktoken").read_text().splitlines()
    (a, b), tail = (line.split()[0] for line in lines[300:302]), lines[302:]
    (out_dir / "tokenizer.tiktoken").write_text("\n".join([*lines[:300], f"{b} 300", f"{a} 301", *tail]) + "\n")
    message = fail("pretrain", out_dir, *OPTIONS["pretrain"], "--max_steps=1")
    assert "tokenizer" in message and "python prepare.py" in message


def test_truncated_checkpoint(folder, tmp_path):
    """A checkpoint that was cut off is named, with the command that makes it again."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    whole = (out_dir / "pretrain.pt").read_bytes()
    (out_dir / "pretrain.pt").write_bytes(whole[:len(whole) // 2])
    message = fail("sft", out_dir)
    assert "pretrain.pt" in message and "truncated" in message and "python pretrain.py" in message


def test_context_shorter_than_the_prompts(folder, tmp_path):
    """A context that does not hold the held-out prompts is refused before anything is trained, and one that does not
    hold the conversations when they are to be learned: the remedy is a longer context."""
    out_dir = copy(folder, tmp_path / "out", PREPARED)
    message = fail("pretrain", out_dir, *OPTIONS["pretrain"], "--block_size=16", "--max_steps=2")
    assert "--block_size=16" in message and "larger" in message and not (out_dir / "pretrain.pt").exists()
    os.remove(out_dir / "eval.jsonl")
    succeed("pretrain", out_dir, *OPTIONS["pretrain"], "--block_size=16", "--max_steps=2")
    message = fail("sft", out_dir, *OPTIONS["sft"])
    assert "16 tokens" in message and "--block_size" in message


# ---------------------------------------------------------------------------------------------------------------------
# Configuration and structure, as the sources have them

CONFIGS = dict(prepare="PrepareConfig", model="ModelConfig", pretrain="PretrainConfig", sft="SFTConfig",
               reward="RewardConfig", ppo="PPOConfig", sample="SampleConfig")


@pytest.mark.parametrize("script", [pytest.param(s, marks=needs_sample if s == "sample" else ()) for s in CONFIGS])
def test_tiny_toml_spells_out_the_defaults(script):
    """Every option stands in its table of configs/tiny.toml with its default, and nothing else does."""
    with open(ROOT / "configs/tiny.toml", "rb") as f:
        file = tomllib.load(f)
    cls = getattr(importlib.import_module(script), CONFIGS[script])
    shared = {f.name: f.default for f in dataclasses.fields(RunConfig)}
    elsewhere = shared.keys() | ({f.name for f in dataclasses.fields(ModelConfig)} if script == "pretrain" else set())
    own = {f.name: f.default for f in dataclasses.fields(cls) if f.metadata and f.name not in elsewhere}
    own.pop("resume", None)  # not a setting of a run
    for place, table, defaults in (("top level", {k: v for k, v in file.items() if not isinstance(v, dict)}, shared),
                                   (f"[{script}]", file[script], own)):
        assert table.keys() == defaults.keys(), place
        for name in table:
            assert table[name] == defaults[name] and type(table[name]) is type(defaults[name]), (place, name)
    if issubclass(cls, RunConfig):
        assert load_config(cls, "", [f"--config={ROOT / 'configs/tiny.toml'}"]) == load_config(cls, "", [])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_config_fits_every_script(path):
    """Each file of configs/ can be given to each script: no key is unknown, no value impossible."""
    if path.stem != "world":
        for script in SCRIPTS[2:] + SCRIPTS[:1]:
            load_config(getattr(importlib.import_module(script), CONFIGS[script]), "", [f"--config={path}"])


def sources():
    paths = [ROOT / f"{name}.py" for name in SCRIPTS if name != "sample" or HAS_SAMPLE]
    return {path.stem: path.read_text(encoding="utf-8") for path in paths}


def calls(tree):
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_no_stage_imports_another():
    """Stages pass files, not objects: they import model.py and prepare.py alone, prepare.py imports model.py alone."""
    for name, source in sources().items():
        imported = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
        assert imported & set(SCRIPTS) <= dict(model=set(), prepare={"model"}).get(name, {"model", "prepare"}), name
        assert not imported & {"pickle", "runpy", "importlib", "marshal"}, name


def test_nothing_is_executed_from_files():
    """Checkpoints load as tensors and plain values only; no source calls eval or exec."""
    loads = 0
    for name, source in sources().items():
        for function, node in calls(ast.parse(source)):
            assert function not in ("eval", "exec", "compile", "__import__", "np.load"), (name, node.lineno)
            if function == "torch.load":
                loads += 1
                assert "weights_only=True" in map(ast.unparse, node.keywords), (name, node.lineno)
    assert loads


@pytest.mark.parametrize("name", [pytest.param(s, marks=needs_sample if s == "sample" else ()) for s in SCRIPTS])
def test_lines_fit_a_page(name):
    """No line is longer than 120 characters or ends in blanks."""
    for number, line in enumerate((ROOT / f"{name}.py").read_text(encoding="utf-8").split("\n"), 1):
        assert len(line) <= 120 and line == line.rstrip(), f"{name}.py, line {number}"
