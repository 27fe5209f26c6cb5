"""Grading figures: do the run folders of a submission belong to the student's world, and do they
show what an experiment should show?

    ppo-free.kl > ppo.kl                              figures of scorecard.json, in out/tiny
    uncleaned/prepare.recall < tiny/prepare.recall    of other run folders: out/uncleaned, out/tiny
    ppo.entropy@first < 2 * ppo.entropy@last          of a stage's first and last step in log.jsonl

A world is known by what prepare.py makes of the student's seed. Whoever wants to can still write a
scorecard by hand; all commands can be repeated, and give the same figures on the same machine.
"""

import json
import operator
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from tools.course_source import Refused, read  # noqa: E402

OPERATORS = {"<": operator.lt, ">": operator.gt}
# Options in which two runs may differ although they are compared.
INCIDENTAL = {"out_dir", "device", "dtype", "micro_batch_size", "resume", "recompute", "compile"}


@dataclass
class RunFiles:
    """What a submission holds of a run folder."""
    name: str
    data: dict       # data.json
    card: dict       # scorecard.json
    log: list        # log.jsonl

    def options_of(self, stage):
        """The options with which a stage was run last."""
        found = [r["config"] for r in self.log if r["stage"] == stage and "config" in r]
        if not found:
            raise Refused(f"out/{self.name}/log.jsonl knows no run of {stage}")
        return found[-1]

    def figure(self, stage, name):
        """A figure of the scorecard, which the log must have, too; or NAME@first, NAME@last."""
        name, _, place = name.partition("@")
        logged = [r[name] for r in self.log if r["stage"] == stage and name in r]
        if place:
            return logged[0 if place == "first" else -1]
        value = self.card[stage][name]
        if stage != "prepare" and value not in logged:
            raise Refused(f"out/{self.name}: scorecard and log disagree about {stage}'s {name}")
        return value


def read_run(folder, name):
    try:
        run = folder / "out" / name
        data, card = json.loads(read(run / "data.json")), json.loads(read(run / "scorecard.json"))
        log = [json.loads(line) for line in read(run / "log.jsonl").splitlines()]
    except FileNotFoundError as error:
        raise Refused(f"out/{name}/{Path(error.filename).name} was not handed in")
    except (OSError, ValueError):
        raise Refused(f"a file of out/{name} cannot be read: hand in what the scripts wrote")
    return RunFiles(name, data, card, log)


def parse_command(command):
    """"python ppo.py --kl_coefficient=0 --variant=free" → ("ppo-free", "tiny", {options})."""
    _, script, *arguments = shlex.split(command)
    options = dict(a.removeprefix("--").partition("=")[::2] for a in arguments)
    variant, folder = options.get("variant"), options.pop("out_dir", "out/tiny")
    stage = script.removesuffix(".py") + (f"-{variant}" if variant else "")
    return stage, folder.removeprefix("out/"), options


def make_world(seed, options):
    """data.json and the scorecard's row of what prepare.py makes of a seed."""
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        given = [f"--{name}={value}" for name, value in options.items()]
        command = [sys.executable, "prepare.py", f"--seed={seed}", f"--out_dir={folder}", *given]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        card = json.loads(read(Path(folder, "scorecard.json")))
        return json.loads(read(Path(folder, "data.json"))), card["prepare"]


def check_world(run, seed, world):
    """Refuse a run folder that is not of this seed's world."""
    data, figures = world
    if run.data["config"]["seed"] != seed:
        raise Refused(f"out/{run.name} is of seed {run.data['config']['seed']}, not {seed}")
    same = all(run.data[name] == data[name] for name in ("tokenizer", "train", "val"))
    theirs = run.card["prepare"] | dict(seconds=figures["seconds"])
    if not same or theirs != figures:
        raise Refused(f"out/{run.name} is not what prepare.py makes of seed {seed}")


def check_options(options, expected, stage):
    """Refuse a stage that was run with other options than it should have been."""
    for name, value in expected.items():
        wanted = type(options[name])(value)
        if options[name] != wanted:
            raise Refused(f"{stage} was run with {name}={options[name]}, not {wanted}")


def check_claim(claim, runs, commands, seed):
    """Refuse figures that do not show what they should."""
    left, sign, right = claim.partition(" < ") if " < " in claim else claim.partition(" > ")
    values, stages = [], []
    for side in (left, right):
        factor, _, reference = side.rpartition(" * ")
        if reference.replace(".", "").isdigit():
            values.append(float(reference))
            continue
        folder, _, name = reference.rpartition("/")
        stage, figure = name.split(".")
        run = runs[folder or "tiny"]
        values.append(float(factor or 1) * run.figure(stage, figure))
        if stage != "prepare":
            stages.append((stage, run.options_of(stage)))
    given = {stage: options for stage, _, options in commands}
    for stage, options in stages:
        check_options(options, given.get(stage) or dict(seed=seed), stage)
    if len(stages) == 2 and stages[0][0].split("-")[0] == stages[1][0].split("-")[0]:
        allowed = INCIDENTAL.union(*(given.get(stage, {}) for stage, _ in stages))
        for name in stages[0][1].keys() - allowed:
            if stages[0][1][name] != stages[1][1][name]:
                raise Refused(f"{stages[0][0]} and {stages[1][0]} differ in {name}, too")
    if not OPERATORS[sign.strip()](*values):
        raise Refused(f"{claim} is not so: {values[0]:.3f} and {values[1]:.3f}")


def grade_experiments(experiments, folder, seed):
    """Yields (name, points, points at most, lines) of each experiment; claims count equally."""
    worlds = {}
    for experiment in experiments:
        lost, commands = [], [parse_command(c) for c in experiment["run"] if "python" in c]
        for claim in experiment["shows"]:
            try:
                names = {word.split("/")[0] for word in claim.split() if "/" in word} or {"tiny"}
                runs = {name: read_run(folder, name) for name in names}
                for name, run in runs.items():
                    prepared = [o for stage, f, o in commands if (stage, f) == ("prepare", name)]
                    options = prepared[0] if prepared else {}
                    key = tuple(options.items())
                    worlds[key] = worlds.get(key) or make_world(seed, options)
                    check_world(run, seed, worlds[key])
                check_claim(claim, runs, commands, seed)
            except Refused as reason:
                lost.append(str(reason))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                lost.append(f"{claim}: a file lacks it, or is damaged ({error!r})")
        share = 1 - len(lost) / len(experiment["shows"])
        points = round(experiment["points"] * share, 2)
        yield experiment["name"], points, experiment["points"], list(dict.fromkeys(lost))
