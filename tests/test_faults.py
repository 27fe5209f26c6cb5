"""Nothing is lost: killed processes, dead ranks, damaged files, full disks, two runs at a time."""

import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch

from model import load_checkpoint
from prepare import load_tokens
from test_chain import (INPUTS, OPTIONS, PIPES, PREPARED, ROOT, TORCHRUN, assert_identical, command, copy,
                        fail, finish, folder, load, needs_torchrun, read_log, succeed)  # noqa: F401
from test_prepare import one_line

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


# ---------------------------------------------------------------------------------------------------------------------
# Killed

@needs_fork
@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_killed_at_any_instant(folder, tmp_path, stage):
    """Killed twenty times at random instants and resumed each time, a stage ends with the weights of the run that went
    through, bit for bit; after every kill all checkpoints can be loaded and all lines are whole."""
    out_dir = copy(folder, tmp_path / "out", INPUTS[stage])
    options = command(stage, out_dir, *OPTIONS[stage])[2:]
    done = finish([sys.executable, str(ROOT / "tests/killer.py"), stage, "20", "1", *options])
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] == 20 and result["status"] == 0, done.stderr[-3000:]
    for key in ("model", "step"):
        assert_identical(load(folder / f"{stage}.pt")[key], load(out_dir / f"{stage}.pt")[key], key)


@needs_fork
def test_killed_preparation_can_be_run_again(folder, tmp_path):
    """Killed while it prepares, prepare.py leaves no half file under a final name; run again, it writes what it would
    have written."""
    rng = random.Random(3)
    out_dir = tmp_path / "out"
    for _ in range(4):
        process = subprocess.Popen(command("prepare", out_dir, *OPTIONS["prepare"]), **PIPES)
        time.sleep(rng.uniform(1.5, 3))
        process.kill()
        process.communicate()
        for name in PREPARED:
            assert not (out_dir / name).exists() or (out_dir / name).read_bytes() == (folder / name).read_bytes(), name
    succeed("prepare", out_dir, *OPTIONS["prepare"])
    for name in PREPARED:
        assert (out_dir / name).read_bytes() == (folder / name).read_bytes(), name


def interrupt(out_dir, stage, *options):
    """Run a stage and stop it by Ctrl-C after its first logged step."""
    process = subprocess.Popen(command(stage, out_dir, *options), **PIPES)
    for line in process.stdout:
        if line.startswith("step "):
            process.send_signal(signal.SIGINT)
            break
    process.communicate(timeout=60)
    return load(out_dir / f"{stage}.last.pt")["step"]


@needs_torchrun
def test_resume_with_more_processes(folder, tmp_path):
    """Begun by one process and resumed by two, pretraining goes on with the same batches: the losses of one to 1e-4."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["pretrain"])
    stopped = interrupt(out_dir, "pretrain", *OPTIONS["pretrain"])
    succeed("pretrain", out_dir, *OPTIONS["pretrain"], "--resume", python=TORCHRUN)
    one, two = read_log(folder, "pretrain", "loss"), read_log(out_dir, "pretrain", "loss")
    assert 0 < stopped < 40 and max(two) == 40
    for step in one.keys() & two.keys():
        assert two[step] == pytest.approx(one[step], abs=1e-4), step


@needs_torchrun
def test_an_optimizer_in_parts(folder, tmp_path):
    """Begun by one process, resumed by two that share out the optimizer's state, and finished by one again,
    pretraining has the losses, weights and optimizer of one process (catches parts of the state that are not saved)."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["pretrain"])
    assert 0 < interrupt(out_dir, "pretrain", *OPTIONS["pretrain"]) < 40
    succeed("pretrain", out_dir, *OPTIONS["pretrain"], "--resume", "--shard_optimizer", python=TORCHRUN)
    succeed("pretrain", out_dir, *OPTIONS["pretrain"], "--resume")
    one, two = read_log(folder, "pretrain", "loss"), read_log(out_dir, "pretrain", "loss")
    assert all(two[step] == pytest.approx(one[step], abs=1e-4) for step in one.keys() & two.keys()) and max(two) == 40
    one, two = load(folder / "pretrain.last.pt"), load(out_dir / "pretrain.last.pt")
    for a, b in zip(one["optimizer"], two["optimizer"], strict=True):
        assert a["state"].keys() == b["state"].keys() and a["param_groups"] == b["param_groups"]
        torch.testing.assert_close(b["state"], a["state"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(two["model"], one["model"], rtol=1e-3, atol=1e-3)


@needs_torchrun
def test_a_rank_that_dies_is_replaced(folder, tmp_path):
    """Under torchrun --max-restarts one process is killed; the run comes back by itself from its last checkpoint, and
    ends with the losses of an undisturbed one."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["pretrain"])
    options = [o for o in OPTIONS["pretrain"] if "steps" not in o and "every" not in o] + ["--max_steps=300",
                                                                                         "--eval_every=10"]
    python = (*TORCHRUN, "--max-restarts=3", "--monitor-interval=0.1")
    process = subprocess.Popen(command("pretrain", out_dir, *options, python=python), start_new_session=True, **PIPES)
    while not (out_dir / "pretrain.last.pt").exists() and process.poll() is None:
        time.sleep(0.02)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], stdout=subprocess.PIPE, text=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0 and "connectFullMesh" not in errors, errors      # nobody has called the dead
    steps = [r["step"] for r in map(json.loads, (out_dir / "log.jsonl").read_text().splitlines())
             if r.get("step") and "loss" in r]
    assert steps[-1] == 300 and steps.count(1) == 1                                 # it did not begin anew
    assert load(out_dir / "pretrain.pt")["step"] > 0


@needs_fork
def test_killed_preparation_leaves_no_process_behind(tmp_path):
    """The processes that clean end with their parent, even if it is killed: none goes on, none keeps the folder."""
    def ps(*options):
        return subprocess.run(["ps", "-o", *options], stdout=subprocess.PIPE, text=True).stdout.split()

    quiet = PIPES | dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process, children = subprocess.Popen(command("prepare", tmp_path, "--megabytes=50"), **quiet), []
    while len(children) < os.cpu_count() and process.poll() is None:
        children = ps("pid=", "--ppid", str(process.pid))
    process.kill()
    process.wait()
    deadline = time.time() + 20
    while time.time() < deadline and any(ps("stat=", "-p", child)[:1] not in ([], ["Z"]) for child in children):
        time.sleep(0.1)
    assert len(children) >= os.cpu_count() and time.time() < deadline
    succeed("prepare", tmp_path, *OPTIONS["prepare"])


def test_two_runs_in_one_folder(folder, tmp_path):
    """While a stage is at work in a folder, another one refuses and names its process; a reader does not mind."""
    pytest.importorskip("fcntl")
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["pretrain"], "pretrain.pt"))
    process = subprocess.Popen(command("pretrain", out_dir, *OPTIONS["pretrain"], "--max_steps=100000"), **PIPES)
    while not process.stdout.readline().startswith("step "):
        pass
    message = fail("sft", out_dir)
    assert f"process {process.pid} is at work" in message and "--out_dir" in message
    succeed("sample", out_dir, "--next=The")
    process.kill()
    process.communicate()
    succeed("sft", out_dir, *OPTIONS["sft"], "--epochs=1")                          # a killed run holds no lock


# ---------------------------------------------------------------------------------------------------------------------
# Damaged

def test_bit_flips_in_a_checkpoint(folder, tmp_path):
    """Wherever a bit of a checkpoint has changed, it is read as before, because nothing lay there, or not at all."""
    whole, rng = (folder / "sft.pt").read_bytes(), random.Random(0)
    before, refused, path = load(folder / "sft.pt"), 0, str(tmp_path / "sft.pt")
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "sft.pt").write_bytes(damaged)
        try:
            found = load_checkpoint(path, "python sft.py")
        except SystemExit as error:
            refused += 1
            assert path in error.code and "python sft.py" in error.code and "\n" not in error.code
        else:
            assert_identical(before["model"], found["model"], "model")
    assert refused > 30


def test_bit_flips_in_the_tokens(folder, tmp_path):
    """A changed token is noticed before anything is trained on it."""
    copy(folder, tmp_path / "out", PREPARED)
    path = tmp_path / "out/train.bin"
    damaged = bytearray(path.read_bytes())
    damaged[1000] ^= 1
    path.write_bytes(damaged)
    assert "train.bin" in one_line(load_tokens, str(tmp_path / "out"), "train")


@pytest.mark.parametrize("name, script", [("tokenizer.tiktoken", "pretrain"), ("data.json", "pretrain"),
                                          ("sft.jsonl", "sft"), ("prompts.jsonl", "reward"), ("eval.jsonl", "pretrain")])
def test_truncated_files_are_named(folder, tmp_path, name, script):
    """A file that was cut off ends in one line with its name and the remedy."""
    out_dir = copy(folder, tmp_path / "out", INPUTS[script])
    whole = (out_dir / name).read_bytes()
    (out_dir / name).write_bytes(whole[:len(whole) // 2 - 3])
    message = fail(script, out_dir, *OPTIONS[script])
    assert name in message or name == "tokenizer.tiktoken" and "tokenizer" in message
    assert "python prepare.py" in message


@pytest.mark.parametrize("name, script, old, new", [
    ("sft.jsonl", "sft", b"messages", b"messagds"), ("sft.jsonl", "sft", b'"role"', b'"rolf"'),
    ("sft.jsonl", "sft", b"content", b"con\xf4ent"), ("prompts.jsonl", "reward", b'"prompt"', b'"prnmpt"'),
    ("prompts.jsonl", "reward", b"mentions", b"mentkons"), ("eval.jsonl", "pretrain", b'"id"', b'"ie"'),
    ("data.json", "pretrain", b"byte_entropy", b"byte_entrnpy"), ("data.json", "sft", b'"val"', b'"vam"'),
    ("scorecard.json", "sft", b"{", b"["), ("log.jsonl", "sample", b"{", b"["), ("log.jsonl", "sample", b'"stage"', b'"stale"'),
    ("samples.jsonl", "rank", b'"ended"', b'"enled"'), ("samples.jsonl", "rank", b'"prompt"', b'"prnmpt"'),
    ("rankings.jsonl", "human", b'"responses"', b'"respenses"'),
    ("tokenizer.tiktoken", "sft", b"AA== 0", b"AQ== 0")])
def test_flipped_bits_are_named(folder, tmp_path, name, script, old, new):
    """A changed bit in a text file ends in one line with its name, whether or not the file is still JSON."""
    out_dir = copy(folder, tmp_path / "out", {*INPUTS.get(script, INPUTS["ppo"]), name, "pretrain.pt", "samples.jsonl"})
    whole = (out_dir / name).read_bytes()
    assert old in whole
    (out_dir / name).write_bytes(whole.replace(old, new, 1))
    options = dict(sample=["--compare"], rank=["--steps=rank"], human=["--steps=rank", "--annotator=human"])
    message = fail(dict(rank="reward", human="reward").get(script, script), out_dir, *OPTIONS.get(script, options.get(script)))
    assert name in message or name == "tokenizer.tiktoken" and "tokenizer" in message


class Payload:
    """What an attacker would put into a checkpoint."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_payload_is_not_executed(folder, tmp_path):
    """A checkpoint that carries a call, in torch's format or as a bare pickle, is refused, and nothing is called; loaded
    without care, it would be."""
    whole, path = torch.load(folder / "sft.pt", weights_only=True), tmp_path / "sft.pt"
    torch.save(whole | dict(best=Payload(str(tmp_path / "harm"))), path)
    assert "sft.pt" in one_line(load_checkpoint, str(path), "python sft.py")
    assert not (tmp_path / "harm").exists() and zipfile.is_zipfile(path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()                                             # the payload works
    path.write_bytes(pickle.dumps(Payload(str(tmp_path / "more"))))
    assert "sft.pt" in one_line(load_checkpoint, str(path), "python sft.py")
    assert not (tmp_path / "more").exists()


def test_a_loss_that_is_not_finite(folder, tmp_path):
    """When the loss blows up, the run stops with the step and what to try; the last checkpoint is what it was."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    model = load(out_dir / "pretrain.pt")
    model["model"]["model.norm.weight"][3] = math.nan
    torch.save(model, out_dir / "pretrain.pt")
    message = fail("sft", out_dir, *OPTIONS["sft"])
    assert "step 0" in message and "learning rate" in message and not (out_dir / "sft.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on file sizes is tried on Linux")
def test_full_disk(folder, tmp_path):
    """When a checkpoint does not fit on the disk, one line says so, the old one stays, and no half file is left."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["sft"], "sft.pt", "sft.last.pt"))
    before = {name: (out_dir / name).read_bytes() for name in ("sft.pt", "sft.last.pt")}
    limit = f"ulimit -f {len(before['sft.pt']) // 2048}; trap '' XFSZ; exec \"$@\""
    done = finish(["bash", "-c", limit, "bash", *command("sft", out_dir, *OPTIONS["sft"])])
    assert done.returncode and len(done.stderr.strip().splitlines()) == 1 and "disk full?" in done.stderr, done.stderr
    assert not list(out_dir.glob("*.tmp"))
    kept = {path.read_bytes() for path in out_dir.glob("sft*.pt")}
    assert set(before.values()) <= kept
