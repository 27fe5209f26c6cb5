"""Grading figures: do the run folders of a submission belong to the student's world, and do they
show what an experiment should show?

    ppo-free.kl > ppo.kl                              figures of scorecard.json, in out/tiny
    uncleaned/prepare.recall < tiny/prepare.recall    of other run folders: out/uncleaned, out/tiny
    ppo.entropy@first < 2 * ppo.entropy@last          of a stage's first and last step in log.jsonl

A world is known by what prepare.py makes of the student's seed, and all options but those of the
experiment must be the defaults. Whoever wants to can still write these files by hand: a run can be
repeated, and gives the same figures on the same machine.
"""

import functools
import json
import operator
import os
import re
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
# Options that need not be as they were set, as they do not change what is learned.
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
        log_path = run / "log.jsonl"  # where only prepare.py was run there is none
        log = read(log_path).splitlines() if log_path.exists() else []
        log = [json.loads(line) for line in log]
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


def run_here(*command):
    """The output of a command of the project; one that fails is a fault of ours."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, text=True,
                          stdout=subprocess.PIPE)
    return done.stdout


@functools.cache
def default_options(script):
    """The options of a stage without arguments; none for a script that students add."""
    if not os.path.exists(os.path.join(ROOT, f"{script}.py")):
        return {}
    code = (f"import json, {script} as s; configs = [c for n, c in vars(s).items()"
            f" if getattr(c, 'table', 0) == '{script}']; print(json.dumps(vars(configs[0]())))")
    return json.loads(run_here("-c", code))


@functools.cache
def make_world(seed, options):
    """What prepare.py makes of a seed: data.json, and its row of the scorecard."""
    with tempfile.TemporaryDirectory(prefix="course-") as folder:
        given = [f"--{name}={value}" for name, value in options]
        run_here("prepare.py", f"--seed={seed}", f"--out_dir={folder}", *given)
        card = json.loads(read(Path(folder, "scorecard.json")))
        return json.loads(read(Path(folder, "data.json"))), card["prepare"]


def check_world(run, seed, options, own_cleaning):
    """Refuse a run folder that is not of this seed's world. Where the cleaning is the student's
    own, other documents may be left, and so the tokens may be others: pages are counted then."""
    def pages(data):
        spoiled = {kind: found.split(" of ")[1] for kind, found in data["by_kind"].items()}
        return data["documents_read"], spoiled

    if run.data["config"]["seed"] != seed:
        raise Refused(f"out/{run.name} is of seed {run.data['config']['seed']}, not of {seed}")
    data, figures = make_world(seed, tuple(options.items()))
    same = pages(run.data) == pages(data)
    if not own_cleaning:
        same = same and all(run.data[name] == data[name] for name in ("tokenizer", "train", "val"))
        same = same and run.card["prepare"] | dict(seconds=figures["seconds"]) == figures
    if not same:
        raise Refused(f"out/{run.name} is not what prepare.py makes of seed {seed}")


def check_options(stage, options, given, seed):
    """Refuse a stage that was run with other options than the defaults and those given."""
    expected = default_options(stage.split("-")[0]) | dict(seed=seed) | given
    for name, value in expected.items():
        option = options[name]  # what stands in a command is text
        wanted = str(value).lower() == "true" if isinstance(option, bool) else type(option)(value)
        if name not in INCIDENTAL and option != wanted:
            raise Refused(f"{stage} was run with {name}={option}, not {value}")


def check_claim(claim, runs, commands, seed):
    """Refuse figures that do not show what they should."""
    given = {(folder, stage): options for stage, folder, options in commands}
    left, sign, right = re.split(" ([<>]) ", claim)
    values = []
    for side in (left, right):
        factor, _, reference = side.rpartition(" * ")
        if re.fullmatch(r"[\d.]+", reference):
            values.append(float(reference))
            continue
        folder, _, name = reference.rpartition("/")
        stage, figure = name.split(".")
        run = runs[folder or "tiny"]
        if stage != "prepare":
            check_options(stage, run.options_of(stage), given.get((run.name, stage), {}), seed)
        values.append(float(factor or 1) * run.figure(stage, figure))
    if not OPERATORS[sign](*values):
        raise Refused(f"{claim} is not so: they are {values[0]:.3f} and {values[1]:.3f}")


def grade_experiments(unit, folder, seed):
    """Yields (name, points, points at most, lines) of each experiment of a week or project. Its
    points are shared equally by its claims."""
    for experiment in unit["experiment"]:
        commands = [parse_command(c) for c in experiment["run"] if c.startswith("python")]
        lost = []
        for claim in experiment["shows"]:
            try:
                names = set(re.findall(r"(\w+)/", claim)) or {"tiny"}
                runs = {name: read_run(folder, name) for name in names}
                for name, run in runs.items():
                    options = [o for stage, at, o in commands if (stage, at) == ("prepare", name)]
                    own_cleaning = unit.get("own_cleaning", False)
                    check_world(run, seed, options[0] if options else {}, own_cleaning)
                check_claim(claim, runs, commands, seed)
            except Refused as reason:
                lost.append(str(reason))
            except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
                lost.append(f"{claim}: a file lacks it, or is damaged ({error!r})")
        share = 1 - len(lost) / len(experiment["shows"])
        points = round(experiment["points"] * share, 2)
        yield experiment["name"], points, experiment["points"], list(dict.fromkeys(lost))
