"""Nothing is lost: killed processes, damaged files, full disks, two runs at a time."""

import json
import math
import os
import pickle
import random
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from chain import (INPUTS, OPTIONS, PREPARED, ROOT, STAGES, TORCHRUN, TRAIN_ONLY, Process,
                   assert_identical, command, copy, fail, finish, load, needs_forks, needs_torchrun,
                   one_line, one_line_of, prepare_options, read_json, read_lines, read_log, succeed)

from model import load_checkpoint

if sys.platform == "linux":
    import resource

# --------------------------------------------------------------------------------------------------
# Killed

def assert_whole(out_dir, stage):
    """Whatever has its final name can be read."""
    for path in out_dir.glob(f"{stage}*.pt"):
        load_checkpoint(str(path), "")
    for name in ("log.jsonl", "samples.jsonl", "rankings.jsonl", f"{stage}.held_out.jsonl"):
        if (out_dir / name).exists():
            read_lines(out_dir / name)
    if (out_dir / "scorecard.json").exists():
        read_json(out_dir / "scorecard.json")


@needs_forks
@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_instant(folder, tmp_path, stage, kills):
    """Killed at random instants and resumed each time, a stage ends with the weights and the log of
    the run that went through, bit for bit; after every kill all that is there is whole."""
    out_dir = copy(folder, tmp_path / "out", INPUTS[stage])
    last, log = out_dir / f"{stage}.last.pt", out_dir / "log.jsonl"
    rng, killed, resumed, longest = random.Random(kills), 0, 0, math.inf
    for _ in range(20 * kills):
        if killed >= kills and resumed >= kills / 2:
            break
        if not last.exists():
            log.unlink(missing_ok=True)  # a run that begins anew writes its first steps again
        resume = ["--resume"] if last.exists() else []
        process, started = Process(command(stage, out_dir, *OPTIONS[stage], *resume)), time.time()
        if longest < math.inf:  # the first run shows how long one takes; a resumed one is shorter
            time.sleep(rng.uniform(0, 0.4 * longest if resume else longest))
        if longest < math.inf and process.poll() is None:
            process.kill()
            process.finish()
            killed, resumed = killed + 1, resumed + len(resume)
        else:  # it was quicker: begin anew
            assert process.finish().returncode == 0
            if not resume:  # what a resumed run takes says nothing of a whole one
                longest = min(longest, time.time() - started)
            for path in out_dir.glob(f"{stage}*.pt"):
                path.unlink()
        assert_whole(out_dir, stage)
    assert killed >= kills and resumed
    if not last.exists():
        log.unlink(missing_ok=True)
    succeed(stage, out_dir, *OPTIONS[stage], *["--resume"] * last.exists())
    for key in ("model", "step"):
        assert_identical(load(folder / f"{stage}.pt")[key], load(out_dir / f"{stage}.pt")[key], key)
    assert not list(out_dir.glob("*.tmp"))
    for name in ("loss", "val_loss", "accuracy", "bits_per_byte", "reward"):
        assert read_log(out_dir, stage, name) == read_log(folder, stage, name)
        steps = [line["step"] for line in read_lines(log)
                 if line["stage"] == stage and line["step"] and name in line]
        assert len(steps) == len(set(steps)), (name, steps)


def content(path):
    """The bytes of a file, but for what data.json says of the folder that it is in."""
    if path.name == "data.json":
        return {name: value for name, value in read_json(path).items() if name != "config"}
    return path.read_bytes()


@needs_forks
def test_killed_preparation_can_be_run_again(folder, tmp_path):
    """Killed while it prepares, prepare.py leaves no half file under a final name; run again, it
    writes what it would have written, and leaves nothing else."""
    rng, out_dir = random.Random(3), tmp_path / "out"
    options = prepare_options(out_dir)
    started = time.time()
    succeed("prepare", tmp_path / "other/out", *options)
    longest = time.time() - started
    for _ in range(6):
        process = Process(command("prepare", out_dir, *options))
        time.sleep(rng.uniform(0.1 * longest, longest))
        process.end()
        process.finish()
        for name in filter(lambda name: (out_dir / name).exists(), PREPARED):
            assert content(out_dir / name) == content(folder / name), name
    succeed("prepare", out_dir, *options)
    for name in PREPARED:
        assert content(out_dir / name) == content(folder / name), name
    assert not list(out_dir.rglob("*.tmp"))


def members(group):
    """The processes of a group that have not ended, by what /proc says of them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended just now
            continue
        if int(its_group) == group and state not in "ZX":
            found.append(path.parent.name)
    return found


@needs_forks
def test_killed_preparation_leaves_no_process_behind(tmp_path):
    """The processes that clean end with their parent, even if it is killed: none goes on, and none
    keeps the folder locked."""
    sentence = "The fox number {} and the owl of the {} trees are at home in it. "
    pages = [dict(text=sentence.format(i, i % 97) * 20) for i in range(6000)]
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages))
    options = [f"--text={tmp_path}/pages.jsonl", "--vocab_size=300"]
    process = Process(command("prepare", tmp_path / "out", *options))
    while len(members(process.pid)) <= os.cpu_count() and process.poll() is None:
        pass
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.time() + 10
    while members(process.pid) and time.time() < deadline:
        time.sleep(0.05)
    assert not members(process.pid)
    process.finish()
    (tmp_path / "pages.jsonl").write_text("".join(json.dumps(page) + "\n" for page in pages[:50]))
    succeed("prepare", tmp_path / "out", *options, "--cleaning=false")


@needs_forks
def test_two_runs_in_one_folder(folder, tmp_path):
    """While a stage is at work in a folder, any other one refuses in one line, having changed
    nothing; a reader does not mind. A killed run holds no lock."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["sample"], "samples.jsonl", "rankings.jsonl"))
    process = Process(command("ppo", out_dir, *OPTIONS["ppo"], "--max_steps=100000"))
    process.until("step ")

    def others():
        """What is in the folder, but for the files that ppo.py is writing."""
        return {path.name: path.read_bytes() for path in out_dir.iterdir()
                if path.is_file() and not path.name.startswith(("ppo.", "log.jsonl"))}

    before = others()
    for script in ("prepare", "pretrain", "sft", "reward"):
        options = prepare_options(out_dir) if script == "prepare" else OPTIONS[script]
        message = fail(script, out_dir, *options, "--seed=2")
        assert "another stage is at work" in message and str(out_dir) in message, message
        assert others() == before, script
    succeed("sample", out_dir, "--next=The", "--checkpoint=sft")
    process.kill()
    process.finish()
    succeed("sft", out_dir, *OPTIONS["sft"], "--epochs=1")


# --------------------------------------------------------------------------------------------------
# Damaged

@pytest.mark.parametrize("where", ["anywhere", "directory", "headers"])
def test_bit_flips_in_a_checkpoint(folder, tmp_path, where):
    """Wherever a bit of a checkpoint has changed, it is read as before, because nothing lay there,
    or refused in one line that names the file and the command."""
    whole, path = (folder / "sft.pt").read_bytes(), tmp_path / "sft.pt"
    with zipfile.ZipFile(folder / "sft.pt") as file:
        headers = [info.header_offset + i for info in file.infolist() for i in range(30)]
        directory = range(file.start_dir, len(whole))
    places = {"anywhere": range(len(whole)), "directory": directory, "headers": headers}[where]
    rng, before, refused = random.Random(0), load(folder / "sft.pt"), 0
    for place in rng.sample(places, 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            found = load_checkpoint(str(path), "python sft.py")
        except SystemExit as error:
            refused += 1
            assert str(path) in error.code and "python sft.py" in error.code
            assert "\n" not in error.code
        except Exception as error:
            pytest.fail(f"bit flipped at {place} of {len(whole)}: {type(error).__name__}: {error}")
        else:
            assert_identical(before["model"], found["model"], f"a bit flipped at {place}")
    assert refused > 20


@pytest.mark.parametrize("name, script, options", [
    ("tokenizer.tiktoken", "pretrain", []), ("data.json", "pretrain", []),
    ("train.bin", "pretrain", []), ("val.bin", "pretrain", OPTIONS["pretrain"]),
    ("sft.jsonl", "sft", []), ("prompts.jsonl", "reward", []),
    ("eval.jsonl", "sample", ["--compare"]), ("pretrain.pt", "sft", []), ("reward.pt", "ppo", []),
    ("sft.last.pt", "sft", ["--resume"]), ("scorecard.json", "sample", ["--compare"])])
def test_truncated_files_are_named(folder, tmp_path, name, script, options):
    """A file that was cut off, in the middle or near its end, or that is empty, ends in one line
    with its name; the line names the command, too, if it is a file that only a stage can make."""
    out_dir = copy(folder, tmp_path / "out", {*INPUTS[script], name, "log.jsonl"})
    whole = (out_dir / name).read_bytes()
    for length in (len(whole) // 2, len(whole) * 9 // 10 // 2 * 2 - 1, 0):
        if length == 0 and name.endswith((".jsonl", ".json")):
            continue  # a file without records, but no damaged one
        (out_dir / name).write_bytes(whole[:length])
        message = fail(script, out_dir, *options)
        # A tokenizer that was cut at the end of a line is a whole one, but not the one of the data.
        assert name in message or name == "tokenizer.tiktoken" and "tokenizer" in message, message
        if not name.endswith((".jsonl", "scorecard.json")):
            assert "run python" in message or "with python" in message, message


@pytest.mark.parametrize("name, script, old, new", [
    ("sft.jsonl", "sft", b'"messages"', b'"messagds"'),
    ("prompts.jsonl", "reward", b'"prompt"', b'"prnmpt"'),
    ("prompts.jsonl", "ppo", b'"id"', b'"ie"'), ("eval.jsonl", "sample", b'"id"', b'"ie"'),
    ("eval.jsonl", "sample", b'"prompt": "', b'"prompt": ["'), ("eval.jsonl", "sample", b'"', b"'"),
    ("tokenizer.tiktoken", "sft", b"AA== 0", b"AQ== 0")])
def test_damaged_records_are_named(folder, tmp_path, name, script, old, new):
    """A changed bit in a text file ends in one line with its name, whether or not it is still
    JSON."""
    out_dir = copy(folder, tmp_path / "out", INPUTS[script])
    whole = (out_dir / name).read_bytes()
    assert old in whole
    (out_dir / name).write_bytes(whole.replace(old, new, 1))
    message = fail(script, out_dir, *OPTIONS.get(script, ["--compare"]))
    assert name in message or name == "tokenizer.tiktoken" and "tokenizer" in message, message


@pytest.mark.parametrize("old, new", [
    (b'"responses"', b'"respenses"'), (b'"text"', b'"texd"'), (b'"tokens": [', b'"tokens": [-1, '),
    (b'"tokens": [', b'"tokens": [3000, '), (b'"ranking": [[', b'"ranking": [[9, '),
    (b'"prompt": "', b'"prompt": 7, "": "'), (b'"ranking": [', b'"ranking": 3, "": ['),
    (b'"responses": [', b'"responses": 3, "": ['), (b'"tokens": [', b'"tokens": 3, "": ['),
    (b'"annotator": "', b'"annotator": [], "": "'), (b'"}\n', b'"\n')])
def test_damaged_rankings_are_left_out(folder, tmp_path, old, new):
    """A line of rankings that cannot be used is named with its number, and the others are used."""
    out_dir = copy(folder, tmp_path / "out", (*INPUTS["reward"], "rankings.jsonl"))
    whole = (out_dir / "rankings.jsonl").read_bytes()
    (out_dir / "rankings.jsonl").write_bytes(whole.replace(old, new, 1))
    done = succeed("reward", out_dir, *OPTIONS["reward"], "--steps=train", "--epochs=1")
    assert "rankings.jsonl, line 1: left out" in done.stdout


class Payload:
    """What an attacker would put into a checkpoint."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickled_payload_is_not_executed(folder, tmp_path):
    """A checkpoint that carries a call, in torch's format or as a bare pickle, is refused, and
    nothing is called; loaded without care, it would be."""
    whole, path = torch.load(folder / "sft.pt", weights_only=True), tmp_path / "sft.pt"
    torch.save(whole | dict(best=Payload(str(tmp_path / "harm"))), path)
    assert "sft.pt" in one_line(load_checkpoint, str(path), "python sft.py")
    assert not (tmp_path / "harm").exists() and zipfile.is_zipfile(path)
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()  # the payload works
    path.write_bytes(pickle.dumps(Payload(str(tmp_path / "more"))))
    assert "sft.pt" in one_line(load_checkpoint, str(path), "python sft.py")
    assert not (tmp_path / "more").exists()


# --------------------------------------------------------------------------------------------------
# Losses that are not finite, disks that are full

@pytest.mark.parametrize("stage, parent", [
    ("sft", "pretrain"), ("reward", "pretrain"), ("ppo", "reward")])
def test_a_loss_that_is_not_finite(folder, tmp_path, stage, parent):
    """When the loss blows up, the run stops with the step and what to try; what it has saved, or an
    earlier run, is there as it was."""
    names = {*INPUTS[stage], f"{stage}.pt", f"{stage}.last.pt", "rankings.jsonl"}
    out_dir = copy(folder, tmp_path / "out", names)
    checkpoint = load(out_dir / f"{parent}.pt")
    checkpoint["model"]["model.norm.weight"][3] = math.nan
    torch.save(checkpoint, out_dir / f"{parent}.pt")
    options = [*OPTIONS[stage], *TRAIN_ONLY.get(stage, ())]
    message = fail(stage, out_dir, *options)
    assert "step 0" in message and "earning rate" in message
    assert (out_dir / f"{stage}.last.pt").read_bytes() == (folder / f"{stage}.last.pt").read_bytes()
    kept = [path.read_bytes() for path in out_dir.glob(f"{stage}*.pt")]
    assert (folder / f"{stage}.pt").read_bytes() in kept


def fail_with_files_of_at_most(size, script, out_dir, *options):
    """Run a script whose files cannot grow beyond some bytes, as on a disk that is full; returns
    its one line."""
    process = Process(command(script, out_dir, *options))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, size))
    done = process.finish()
    assert done.returncode == 1, done.stdout[-1500:] + done.stderr[-3000:]
    return one_line_of(done)


@needs_forks
@pytest.mark.parametrize("stage", STAGES)
def test_full_disk(folder, tmp_path, stage):
    """When a checkpoint does not fit on the disk, one line says so, and the earlier ones stay."""
    names = {*INPUTS[stage], f"{stage}.pt", f"{stage}.last.pt", "rankings.jsonl"}
    out_dir = copy(folder, tmp_path / "out", names)
    before = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    options = [*OPTIONS[stage], *TRAIN_ONLY.get(stage, ())]
    message = fail_with_files_of_at_most(len(before[f"{stage}.pt"]) // 2, stage, out_dir, *options)
    assert stage in message and "disk" in message, message
    after = {path.name: path.read_bytes() for path in out_dir.iterdir()}
    before[f"{stage}.old.pt"] = before.pop(f"{stage}.pt")  # moved aside as the run began
    for name in before:
        assert after.get(name) == before[name], name


@needs_forks
def test_full_disk_and_the_log(folder, tmp_path):
    """When the log cannot grow, one line says so, and what it said before is all there."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    lines = (json.dumps(dict(stage="pretrain", step=None, seconds=0)) + "\n") * 20_000
    (out_dir / "log.jsonl").write_text(lines)
    message = fail_with_files_of_at_most(len(lines) + 1000, "sft", out_dir, *OPTIONS["sft"])
    assert "log.jsonl" in message and "File too large" in message, message
    assert (out_dir / "log.jsonl").read_text().startswith(lines)


@needs_forks
@pytest.mark.parametrize("size", [1000, 20_000, 60_000, 80_000])
def test_full_disk_and_the_preparation(folder, tmp_path, size):
    """When its files do not fit on the disk, prepare.py ends in one line, and leaves those of an
    earlier run as they are."""
    out_dir = copy(folder, tmp_path / "out", PREPARED)
    options = [*prepare_options(out_dir), "--seed=2"]
    message = fail_with_files_of_at_most(size, "prepare", out_dir, *options)
    assert str(out_dir) in message and "File too large" in message, message
    for name in PREPARED:
        assert (out_dir / name).read_bytes() == (folder / name).read_bytes(), name


@needs_forks
def test_full_disk_and_half_files(folder, tmp_path):
    """What was written in vain does not stay on the full disk."""
    out_dir = copy(folder, tmp_path / "out", INPUTS["sft"])
    fail_with_files_of_at_most(40_000, "sft", out_dir, *OPTIONS["sft"])
    fail_with_files_of_at_most(40_000, "prepare", out_dir, *prepare_options(out_dir))
    assert not list(out_dir.rglob("*.tmp"))


# --------------------------------------------------------------------------------------------------
# Processes that end

BACKWARD = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from model import Run
from sft import SFTConfig
run = Run(SFTConfig(out_dir=sys.argv[2], device="cpu", dtype="float32"))
model = run.wrap(torch.nn.Linear(3, 3))
model(torch.ones(2, 3)).sum().backward()
print("world", run.world)
"""


@needs_torchrun
@pytest.mark.parametrize("times", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_two_processes_end_cleanly(tmp_path, times):
    """Under torchrun, two processes that have exchanged gradients end with exit code 0, always."""
    (tmp_path / "backward.py").write_text(BACKWARD)
    for i in range(times):
        done = finish([*TORCHRUN, tmp_path / "backward.py", ROOT, tmp_path / "out"])
        assert done.returncode == 0, f"time {i + 1}: {done.stderr[-3000:]}"
        assert done.stdout.count("world") == 2, done.stdout
