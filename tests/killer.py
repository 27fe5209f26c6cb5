"""Kill a stage at random instants, run by test_faults.py: torch is loaded once, and every run is a fork of that.

    python killer.py STAGE N SEED ARGUMENTS…

N times the stage is started, with --resume as soon as there is something to go on from, and killed with SIGKILL after a
random time; after each kill the run folder must be whole. At last it runs to its end."""

import glob
import importlib
import json
import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import prepare  # noqa: F401
from model import load_checkpoint


def start(module, stage, arguments, out_dir):
    """A child that runs the stage; returns its process id."""
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        resume = ["--resume"] * os.path.exists(f"{out_dir}/{stage}.last.pt")
        sys.argv = [f"{stage}.py", *arguments, *resume]
        try:
            module.main()
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            os._exit(1)
    return pid


def check(out_dir, stage):
    """A loadable last checkpoint, if there is one, and whole lines."""
    steps = [load_checkpoint(path, "")["step"] for path in glob.glob(f"{out_dir}/*.pt") if stage in path]
    for name in ("log.jsonl", "samples.jsonl", "rankings.jsonl", "scorecard.json"):
        if os.path.exists(f"{out_dir}/{name}"):
            with open(f"{out_dir}/{name}", encoding="utf-8") as f:
                whole = f.read()
            for line in [whole] if name == "scorecard.json" else whole.splitlines():
                json.loads(line)
            assert whole.endswith("\n"), name
    return max(steps, default=0)


def main():
    stage, n, seed, *arguments = sys.argv[1:]
    out_dir = next(a.split("=", 1)[1] for a in arguments if a.startswith("--out_dir="))
    torch.set_num_threads(1)  # a fork must find no threads
    module, rng, reached, longest = importlib.import_module(stage), random.Random(int(seed)), [], 1.5
    killed = 0
    while killed < int(n):
        started = time.time()
        pid = start(module, stage, arguments, out_dir)
        time.sleep(rng.uniform(0, longest))
        if os.waitpid(pid, os.WNOHANG) != (0, 0):  # it was done before: begin anew, and kill earlier
            longest = max(0.2, 0.8 * (time.time() - started))
            for path in glob.glob(f"{out_dir}/{stage}*.pt"):
                os.remove(path)
            continue
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        killed += 1
        reached.append(check(out_dir, stage))
    _, status = os.waitpid(start(module, stage, arguments, out_dir), 0)
    print(json.dumps(dict(killed=killed, reached=reached, status=status)))


if __name__ == "__main__":
    main()
