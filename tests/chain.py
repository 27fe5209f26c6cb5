"""What the tests of whole scripts share: a miniature of the chain, and ways to run its stages.

A stage is run as its user runs it, as a process with arguments, output and an exit code. On Linux
that process is a fork of one that has loaded torch already (see forks.py)."""

import atexit
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("prepare", "model", "pretrain", "sft", "reward", "ppo", "sample")
STAGES = ("pretrain", "sft", "reward", "ppo")

WORLD = """[numbers]
megabytes = 0.15
demonstrations = 63
prompts = 70
compare_share = 0.7
eval = 20
"""
SHAPE = "--n_layer=2 --n_embd=32 --n_head=2 --n_kv_head=1 --n_inner=64 --block_size=128".split()
OPTIONS = {
    "prepare": ["--vocab_size=512"],  # and --world=, see prepare_options
    "pretrain": [*SHAPE, "--max_steps=40", "--eval_every=6", "--batch_size=8",
                 "--micro_batch_size=4"],
    "sft": "--epochs=4 --batch_size=8".split(),
    "reward": "--epochs=4 --batch_size=4 --n_reward_layer=1 --n_samples=4 --val_share=0.3".split(),
    "ppo": "--max_steps=6 --batch_size=12 --minibatch_size=6 --epochs=2 --save_every=2".split(),
}
TRAIN_ONLY = {"reward": ["--steps=train"]}  # without sampling and ranking anew
PREPARED = ("tokenizer.tiktoken", "train.bin", "val.bin", "data.json", "sft.jsonl", "prompts.jsonl",
            "eval.jsonl")
CHECKPOINTS = ("pretrain.pt", "sft.pt", "reward.pt", "ppo.pt")
# What a stage reads; a folder with these can run it.
INPUTS = {"pretrain": PREPARED, "sft": (*PREPARED, "pretrain.pt"),
          "reward": (*PREPARED, "pretrain.pt", "sft.pt"),
          "ppo": (*PREPARED, "sft.pt", "reward.pt"), "sample": (*PREPARED, *CHECKPOINTS)}

RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in RANKS}
ENVIRONMENT |= dict(OMP_NUM_THREADS="1", PYTHONIOENCODING="utf-8", CUDA_VISIBLE_DEVICES="")
PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", cwd=ROOT,
             env=ENVIRONMENT)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
FORKS = sys.platform == "linux"
needs_forks = pytest.mark.skipif(not FORKS, reason="runs on Linux only, as it forks processes")
needs_torchrun = pytest.mark.skipif(sys.platform == "win32",
                                    reason="torchrun needs libuv, which Windows wheels lack")


# --------------------------------------------------------------------------------------------------
# Processes

class Server:
    """The one process that has loaded torch, started when it is first needed."""
    connection = None

    def ask(self, request, fds=()):
        if self.connection is None:
            self.connection, theirs = socket.socketpair()
            arguments = [sys.executable, str(ROOT / "tests/forks.py"), str(theirs.fileno())]
            self.process = subprocess.Popen(
                arguments, cwd=ROOT, env=ENVIRONMENT, pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL, start_new_session=True)
            theirs.close()
            atexit.register(self.close)
        socket.send_fds(self.connection, [json.dumps(request).encode()], list(fds))
        answer = b""
        while not answer.endswith(b"\n"):
            piece = self.connection.recv(2**16)
            assert piece, "tests/forks.py has ended"
            answer += piece
        return json.loads(answer)

    def close(self):
        self.connection.close()
        self.process.wait()


SERVER = Server()


class Process:
    """A running command, such as `command` makes. Its output can be read line by line from
    `stdout`.

    typed: what it finds on its standard input, before the end of file, as text or bytes;
    environment: what its environment has besides ours."""

    def __init__(self, arguments, typed="", **environment):
        self.arguments, self.returncode = [str(a) for a in arguments], None
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8")
        self.forked = FORKS and self.arguments[0] == sys.executable and self.arguments[1] != "-m"
        reading, writing = os.pipe()
        self.stdout = open(reading, encoding="utf-8", errors="replace")
        with tempfile.TemporaryFile() as given:
            given.write(typed if isinstance(typed, bytes) else typed.encode())
            given.seek(0)
            if self.forked:
                request = dict(argv=self.arguments[1:], environment=environment)
                fds = given.fileno(), writing, self.errors.fileno()
                self.pid = SERVER.ask(request, fds)
            else:
                self.popen = subprocess.Popen(
                    self.arguments, cwd=ROOT, env=ENVIRONMENT | environment, stdin=given,
                    stdout=writing, stderr=self.errors, start_new_session=True)
                self.pid = self.popen.pid
        os.close(writing)

    def wait(self):
        if self.returncode is None:
            self.returncode = SERVER.ask(dict(wait=self.pid)) if self.forked else self.popen.wait()
        return self.returncode

    def poll(self):
        if self.returncode is None:
            self.returncode = SERVER.ask(dict(poll=self.pid)) if self.forked else self.popen.poll()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(getattr(signal, "SIGKILL", signal.SIGTERM))

    def end(self):
        """Kill it, and whatever it has started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL) if hasattr(os, "killpg") else self.kill()

    def until(self, beginning):
        """Read the output up to a line that begins like this; returns the lines read."""
        lines = []
        for line in self.stdout:
            lines.append(line)
            if line.startswith(beginning):
                return lines
        errors = self.finish().stderr[-3000:]
        pytest.fail(f"no line {beginning!r}…: {''.join(lines)[-1500:]}{errors}")

    def finish(self, timeout=90):
        """Wait for the end; returns a CompletedProcess. One that hangs is ended, and fails the
        test."""
        timer = threading.Timer(timeout, self.end)
        timer.start()
        stdout = self.stdout.read()
        hung = not timer.is_alive()
        timer.cancel()
        self.wait()
        self.errors.seek(0)
        errors = self.errors.read()
        self.stdout.close()
        self.errors.close()
        if hung:
            pytest.fail(f"{shlex.join(self.arguments)} did not end within {timeout} s")
        return subprocess.CompletedProcess(self.arguments, self.returncode, stdout, errors)


def command(script, out_dir, *options, python=(sys.executable,)):
    """The command line of a script, at the size of these tests."""
    shared = [f"--out_dir={out_dir}", "--device=cpu", "--dtype=float32", "--max_new_tokens=16"]
    return [*python, f"{script}.py", *shared, *options]


def finish(arguments, typed="", **environment):
    """Run a command to its end."""
    return Process(arguments, typed, **environment).finish()


def run(script, out_dir, *options, **more):
    """A script as a user runs it; returns the finished process."""
    return finish(command(script, out_dir, *options, **more))


def succeed(script, out_dir, *options, **more):
    done = run(script, out_dir, *options, **more)
    assert done.returncode == 0, f"{script}.py\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done


def fail(script, out_dir, *options, **more):
    """The one line on stderr in which a mistake of the user's ends."""
    done = run(script, out_dir, *options, **more)
    assert done.returncode != 0, done.stdout[-1500:]
    return one_line_of(done)


def one_line_of(done):
    """The one line on stderr in which a process has ended."""
    message = done.stderr.strip()
    assert message and "\n" not in message, message[-3000:]
    return message


def one_line(function, *arguments, **more):
    """The one line in which a call ends because of a mistake of the user's."""
    with pytest.raises(SystemExit) as caught:
        function(*arguments, **more)
    message = caught.value.code
    assert isinstance(message, str) and "\n" not in message, message
    return message


def two_processes(arguments, meanwhile=None):
    """Run a command in two processes that share the work. They are started with what torchrun puts
    into the environment, but as forks, which is much quicker. Returns what has become of each.

    meanwhile: is called with both while they run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [Process(arguments, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_PORT=port,
                     MASTER_ADDR="127.0.0.1") for rank in "01"]
    if meanwhile:
        meanwhile(*ranks)
    return [rank.finish() for rank in ranks]


# --------------------------------------------------------------------------------------------------
# Run folders

def prepare_options(out_dir):
    """The options of prepare.py for a miniature world, whose numbers are put beside the run
    folder."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    path = out_dir.parent / "world.toml"
    path.write_text(WORLD, encoding="utf-8")
    return [f"--world={path}", *OPTIONS["prepare"]]


def copy(folder, to, names):
    """A new run folder with some files of another."""
    to.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(folder / name, to / name)
    return to


def load(path):
    return torch.load(path, weights_only=True)


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path):
    """The records of a file of JSON lines, each of which must be whole."""
    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") or not text, f"{path}: the last line is not whole"
    return [json.loads(line) for line in text.splitlines()]


def read_log(folder, stage, name):
    """{step: figure} of a stage in log.jsonl."""
    lines = read_lines(folder / "log.jsonl")
    return {r["step"]: r[name] for r in lines if r["stage"] == stage and r["step"] and name in r}


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
