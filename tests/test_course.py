"""The classroom: what is handed out, what comes back, and what it earns."""

import ast
import functools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

import model
import ppo
import prepare
import pretrain
import reward
import sft
from chain import ROOT, one_line
from tools import course, course_figures, course_hidden, course_run
from tools.course_source import Refused, find, function_text, only_tests, replaced, splice, stub

WEEKS = course.COURSE["week"]
EXERCISES = {exercise["name"]: exercise for week in WEEKS for exercise in week["exercise"]}
UNITS = WEEKS + course.COURSE["project"]
EXPERIMENTS = [experiment for unit in UNITS for experiment in unit["experiment"]]
KL, VALUE = EXERCISES["ppo.kl_estimates"], EXERCISES["ppo.value_loss"]


def source_of(module):
    return (ROOT / f"{module}.py").read_text(encoding="utf-8")


@functools.cache
def tree_of(name):
    return ast.parse(source_of(name))


# --------------------------------------------------------------------------------------------------
# The course file

@pytest.mark.parametrize("name", EXERCISES)
def test_every_exercise_names_what_is_there(name):
    """Its function, all its tests and its hidden test exist; the typical mistake can be made, and
    the solution uses nothing that is forbidden."""
    exercise = EXERCISES[name]
    module, path = name.split(".", 1)
    source = source_of(module)
    solution = exercise.get("solution", function_text(source, path))
    assert solution.count(exercise["replace"]) == 1 and exercise["mistake"]
    ast.parse(replaced(source, path, solution.replace(exercise["replace"], exercise["by"])))
    splice(exercise, source, replaced(source, path, solution))
    for test in exercise["tests"] + exercise.get("withheld", []):
        file, function = test.split(".")
        assert isinstance(find(tree_of(f"tests/{file}"), function), ast.FunctionDef), test
    assert exercise["tests"] and callable(getattr(course_hidden, name.replace(".", "_")))


def test_five_weeks_of_200_points():
    assert [week["number"] for week in WEEKS] == [1, 2, 3, 4, 5]
    assert sum(exercise["points"] for exercise in EXERCISES.values()) == 200
    assert len(EXERCISES) == sum(len(week["exercise"]) for week in WEEKS)


def test_the_readme_shows_every_experiment():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for experiment in EXPERIMENTS:
        assert course.experiment_row(experiment) in readme, experiment["name"]


@pytest.mark.parametrize("name", [p["skeleton"] for p in UNITS if "skeleton" in p])
def test_skeletons_fit_the_project(name):
    """A skeleton imports only what there is, and leaves two functions to write."""
    source = (ROOT / "tools/skeletons" / name).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module in ("model", "prepare"):
            module = __import__(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)
    assert source.count("raise NotImplementedError") == 2
    assert max(map(len, source.splitlines())) <= 100


# --------------------------------------------------------------------------------------------------
# Source code

SOURCE = '''import math

LIMIT = 3

class A:
    @staticmethod
    def f(x, y=1):
        """What it does."""
        # how it does it
        return x + y

    def g(self):
        return 2

def h(): return LIMIT
'''
F, H = dict(name="m.A.f"), dict(name="m.h")


def test_a_stub_keeps_decorators_signature_and_docstring():
    made = stub(SOURCE, "A.f", "f: 3 points")
    lines = SOURCE.split("\n")
    expected = [*lines[:8], '        raise NotImplementedError("f: 3 points")', *lines[10:]]
    assert made == "\n".join(expected)
    without = stub(SOURCE, "A.g", "g").split("\n")
    assert without[11:13] == ["    def g(self):", '        raise NotImplementedError("g")']


def call(spliced, expression):
    names = {}
    exec(spliced, names)
    return eval(expression, names)


def test_splicing_takes_the_function_and_what_it_uses():
    """New helpers, imports and constants come along, those that the function uses and no others;
    changes elsewhere do not. A method takes the place of a method, however it is indented."""
    theirs = ('from itertools import chain\nimport math, random\nLIMIT = 99\nUSED = 10\n'
              'UNUSED = 1 / 0\ndef helper(x): return x * USED\n'
              'class A:\n  @staticmethod\n  def f(x: int, y=1) -> int:\n'
              '    return helper(x) + y + LIMIT + len(list(chain([])))\n'
              '  def g(self): return 7\n')
    spliced = splice(F, SOURCE, theirs)
    assert call(spliced, "A.f(1), A().g(), h()") == (10 + 1 + 3, 2, 3)
    assert "UNUSED" not in spliced and "random" not in spliced


@pytest.mark.parametrize("theirs, words", [
    ("class A: pass", "no A.f"), ("def f(x, y=1): return 1", "no A.f"),
    ("class A:\n def f(x, y=1): return 1", "@staticmethod def f(x, y=1)"),
    ("class A:\n @staticmethod\n def f(x, y=2): return 1", "first line"),
    ("class A:\n @staticmethod\n def f(x, y=1)\n  return 1", "m.py, line 3"), ("x = '\0'", "m.py"),
    ("(" * 1000, "m.py")])
def test_what_does_not_fit_is_refused(theirs, words):
    with pytest.raises(Refused, match=".*") as refused:
        splice(F, SOURCE, theirs)
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("body, words", [
    ("import os; os._exit(0)", "import os"), ("os._exit(0)", "_exit"), ("math.os.a", "os"),
    ("from m import h as k; return k()", "import m"), ("import m; return m.h()", "import m"),
    ("from .m import h", "import m"), ("__import__('m')", "__import__"),
    ("import importlib", "importlib"), ("open('m.py')", "open"), ("h.__globals__", "__globals__"),
    ("getattr(math, 'l' + 'og')", "getattr"), ("math.log(3)", "log"), ("globals()", "globals"),
    ("from math import log", "log"), ("import torch.log", "log"), ("eval('1')", "eval")])
def test_what_would_fetch_the_solution_is_refused(body, words):
    """Imports of the reference, ways out of the function, and calls that are the solution: in the
    function, and in what comes along with it."""
    exercise = H | dict(forbid=["log"])
    for theirs in (f"def h(): {body}", f"def h(): return helper()\ndef helper(): {body}"):
        with pytest.raises(Refused) as refused:
            splice(exercise, SOURCE, theirs)
        assert words in str(refused.value)
    splice(exercise, SOURCE, f"def h(): return 1\ndef unused(): {body}")


def test_tests_are_cut_out_with_what_they_use():
    """Fixtures, helpers and constants of the tests stay, and those of other tests go."""
    source = ('"""Tests."""\nimport pytest\n\nX = 1\nY = 2\n\n\n@pytest.fixture\ndef made():\n'
              '    return helper()\n\n\ndef helper():\n    return X\n\n\ndef solution():\n'
              '    return Y\n\n\ndef test_a(made):\n    assert made\n\n\ndef test_b():\n'
              '    assert solution()\n')
    cut = only_tests(source, ["test_a"])
    for unused in ("Y = 2\n", "\n\ndef solution():\n    return Y\n",
                   "\n\ndef test_b():\n    assert solution()\n"):
        source = source.replace(unused, "")
    assert cut == source


# --------------------------------------------------------------------------------------------------
# Running tests

def project_of(folder, test):
    (folder / "tests").mkdir()
    (folder / "tests/test_x.py").write_text(test)
    return folder


def test_a_test_passes_if_all_its_cases_do(tmp_path):
    text = ("import pytest\n@pytest.mark.parametrize('n', [1, 2, 3])\ndef test_a(n): assert n < 3\n"
            "@pytest.mark.parametrize('n', [1, 2])\ndef test_b(n): assert n < 3\n"
            "def test_c(): pytest.skip('not here')\n")
    names = ["test_x.test_a", "test_x.test_b", "test_x.test_c"]
    faults = course_run.run_tests(project_of(tmp_path, text), names, 60)
    assert [bool(faults[name]) for name in names] == [True, False, True]
    assert "assert 3 < 3" in faults["test_x.test_a"]


@pytest.mark.parametrize("test, words", [
    ("import os\ndef test_a(): os._exit(0)", "ended before"),
    ("def test_a():\n    while True: pass", "did not end within 3 seconds")])
def test_a_process_that_ends_early_or_never(tmp_path, test, words):
    with pytest.raises(Refused) as refused:
        course_run.run_tests(project_of(tmp_path, test), ["test_x.test_a"], 3)
    assert words in str(refused.value)


def test_a_file_that_cannot_be_imported(tmp_path):
    folder = project_of(tmp_path, "1 / 0")
    assert course_run.run_tests(folder, ["test_x.test_a"], 60)["test_x.test_a"]


# --------------------------------------------------------------------------------------------------
# Handing out and grading

def arguments(unit, folder, **more):
    defaults = dict(unit=unit, folder=folder, student="ann", secret="s", limit=60)
    return SimpleNamespace(**defaults | more)


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handout") / "week5"
    course.handout(arguments("5", folder))
    return folder


def test_a_handout_holds_no_solution(handed_out):
    """Every function of the week is an exception; the course's own files, compiled ones, the
    history and tests that spell a solution out are not in it."""
    names = {path.relative_to(handed_out).as_posix() for path in handed_out.rglob("*")}
    assert {"ppo.py", "WEEK.md", "mine.toml", "tests/test_rlhf.py", "data/tiny_world.toml"} <= names
    assert not [name for name in names if "course" in name or ".git" in name or "pyc" in name]
    assert "tests/test_proofs.py" not in names and "tests/test_layout.py" not in names
    text = (handed_out / "tests/test_rlhf.py").read_text(encoding="utf-8")
    assert "def test_gae_by_hand" in text and "test_gae_equals_the_direct_sum" not in text
    tree = ast.parse((handed_out / "ppo.py").read_text(encoding="utf-8"))
    for exercise in WEEKS[4]["exercise"]:
        function = find(tree, exercise["name"].split(".", 1)[1])
        assert isinstance(function.body[-1], ast.Raise) and len(function.body) <= 2
    assert (handed_out / "sft.py").read_text(encoding="utf-8") == source_of("sft")


def test_an_earlier_week_has_no_later_tests(tmp_path):
    course.handout(arguments("2", tmp_path / "week2"))
    tests = {path.name for path in (tmp_path / "week2/tests").glob("test_*.py")}
    assert tests == {"test_prepare.py", "test_model.py"}


def test_week_md_names_everything(handed_out):
    """Points and the command of every function, the commands of every experiment in the student's
    own world, and its seed, which is another one for every student."""
    text = (handed_out / "WEEK.md").read_text(encoding="utf-8")
    assert "**gae** in ppo.py: 12 points" in text
    assert "python -m pytest -q tests/test_rlhf.py::test_gae_by_hand" in text
    assert "python ppo.py --config=mine.toml --kl_coefficient=0 --variant=free" in text
    seed = course.seed_of("ann")
    assert f"seed {seed} " in text and course.seed_of(" Ann ") == seed != course.seed_of("bob")
    assert f"seed = {seed}" in (handed_out / "mine.toml").read_text(encoding="utf-8")


def test_nothing_is_overwritten(handed_out, tmp_path):
    assert "is there already" in one_line(course.handout, arguments("5", handed_out))
    (tmp_path / "results.json").write_text("mine")
    message = one_line(course.grade, arguments("5", handed_out, results=tmp_path / "results.json"))
    assert "is there already" in message and (tmp_path / "results.json").read_text() == "mine"
    assert "choose from 1, 2, 3, 4, 5, dpo" in one_line(course.find_unit, "6")


def graded(folder, to, **more):
    """{name: (points, lines)} of results.json."""
    course.grade(arguments("5", folder, results=to, student=None, **more))
    results = json.loads(to.read_text(encoding="utf-8"))
    assert results["score"] == pytest.approx(sum(t["score"] for t in results["tests"]), abs=0.01)
    return {test["name"].split()[0]: (test["score"], test["output"]) for test in results["tests"]}


def test_two_functions_are_handed_out_solved_broken_and_graded(handed_out, tmp_path, monkeypatch):
    """Handed out they earn nothing; solved, everything, in the student's folder, too; of two, one
    of which is broken, the other keeps its points."""
    monkeypatch.setattr(course, "find_unit", lambda _: WEEKS[4] | dict(exercise=[KL, VALUE]))
    assert {points for points, _ in graded(handed_out, tmp_path / "0.json").values()} == {0}
    path, theirs = handed_out / "ppo.py", source_of("ppo")
    try:
        handed = path.read_text(encoding="utf-8")
        for name in ("kl_estimates", "value_loss", "whiten", "gae", "token_rewards", "policy_loss"):
            handed = replaced(handed, name, function_text(theirs, name))
        path.write_text(handed, encoding="utf-8")
        tests = [course_run.test_id(test) for test in KL["tests"] + VALUE["tests"]]
        done = subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=handed_out,
                              env=os.environ | dict(PYTHONPATH=""), stdout=subprocess.PIPE)
        assert done.returncode == 0, done.stdout.decode()
        solved = graded(handed_out, tmp_path / "1.json")
        assert solved == {"kl_estimates": (4, ""), "value_loss": (6, "")}
        path.write_text(handed.replace(VALUE["replace"], VALUE["by"]), encoding="utf-8")
        (handed_out / "tests/test_rlhf.py").unlink()  # nobody has to hand the tests in
        broken = graded(handed_out, tmp_path / "2.json")
        assert broken["kl_estimates"] == (4, "") and broken["value_loss"][0] == 0
        assert "test_value_loss_by_hand: " in broken["value_loss"][1]
    finally:
        monkeypatch.undo()
        course.handout(arguments("5", tmp_path / "again"))
        for name in ("ppo.py", "tests/test_rlhf.py"):
            (handed_out / name).write_text((tmp_path / "again" / name).read_text(encoding="utf-8"),
                                           encoding="utf-8")


@pytest.mark.parametrize("body, words", [
    ("while True:\n        pass", "did not end within"), ("import ppo\n    return 1", "import ppo"),
    ("import os\n    os._exit(0)", "import os"), ("return (", "ppo.py, line"),
    ("return torch.nn.functional.kl_div(logprobs, ref_logprobs)", "kl_div")])
def test_what_earns_nothing(body, words):
    """An endless loop, an import of the reference, a way out, a syntax error, the solution by a
    library: no points, and one line that says why."""
    text = f"def kl_estimates(logprobs, ref_logprobs):\n    {body}"
    source = replaced(source_of("ppo"), "kl_estimates", text)
    points, lines = course.grade_exercise(KL, source, limit=4)
    assert points == 0 and len(lines) == 1 and words in lines[0]


def test_what_is_missing_or_edited_earns_nothing():
    """A changed first line, a missing script, an edited file of tests."""
    source = source_of("ppo").replace("def kl_estimates(logprobs,", "def kl_estimates(new,")
    for theirs, edited, words in ((source, [], "kl_estimates(logprobs, ref_logprobs)"),
                                  (None, [], "no ppo.py"),
                                  (source_of("ppo"), ["test_rlhf.py"], "was edited")):
        points, lines = course.grade_exercise(KL, theirs, edited)
        assert points == 0 and len(lines) == 1 and words in lines[0]


def test_edited_tests_are_noticed(handed_out, monkeypatch):
    """Another text in a file of tests takes the points of its functions; other line ends do not."""
    monkeypatch.setitem(WEEKS[4], "exercise", [KL])
    seen, path = [], handed_out / "tests/test_rlhf.py"
    monkeypatch.setattr(course, "grade_exercise", lambda e, s, edited, *_: seen.append(edited))
    monkeypatch.setattr(course, "handed_out_tests", lambda n: {"test_rlhf.py": "a\nb\n"})
    whole = path.read_bytes()
    try:
        for text in (b"a\nb\n", b"a\r\nb\r\n", b"a\nc\n"):
            path.write_bytes(text)
            with pytest.raises(TypeError):
                list(course.grade_all(course.find_unit("5"), arguments("5", handed_out), "s"))
    finally:
        path.write_bytes(whole)
    assert seen == [[], [], ["test_rlhf.py"]]


# --------------------------------------------------------------------------------------------------
# Figures

DEFAULTS = dict(seed=1, kl_coefficient=0.1, variant="", whiten_rewards=False, out_dir="out/tiny")
WORLD = (dict(tokenizer="abc", train=9, val=2, documents_read=5, by_kind={"markup": "3 of 4"}),
         dict(recall=0.9, seconds=3))


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A submission with ppo and ppo-free, whose KL is 2 and 9; writes what a test changes."""
    monkeypatch.setattr(course_figures, "make_world", lambda seed, options: WORLD)
    monkeypatch.setattr(course_figures, "default_options", lambda script: DEFAULTS)
    folder = tmp_path / "out/tiny"
    folder.mkdir(parents=True)

    def write(data=(), card=(), **options):
        whole = WORLD[0] | dict(config=dict(seed=1)) | dict(data)
        (folder / "data.json").write_text(json.dumps(whole))
        figures = dict(prepare=WORLD[1] | dict(seconds=7), ppo=dict(kl=2.0), **{
            "ppo-free": dict(kl=9.0)}) | dict(card)
        (folder / "scorecard.json").write_text(json.dumps(figures))
        log = [dict(stage="ppo", step=None, config=DEFAULTS), dict(stage="ppo", step=1, kl=0.5),
               dict(stage="ppo", step=2, kl=2.0), dict(stage="ppo-free", step=None, config=DEFAULTS
               | dict(kl_coefficient=0.0, variant="free") | options),
               dict(stage="ppo-free", step=2, kl=9.0)]
        (folder / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in log))

    write()
    return SimpleNamespace(path=tmp_path, write=write, log=folder / "log.jsonl")


def experiment_of(*claims, **more):
    run = ["cp -r a b", "python ppo.py --kl_coefficient=0 --variant=free --whiten_rewards=false"]
    return dict(experiment=[dict(name="x", points=4, run=run, shows=list(claims))], **more)


def lost(run_folder, *claims, **more):
    (_, points, most, lines), = course_figures.grade_experiments(experiment_of(*claims, **more),
                                                                 run_folder.path, 1)
    assert most == 4 and (points < 4) == bool(lines) and not any("\n" in line for line in lines)
    return points, lines


def test_claims(run_folder):
    """Figures of the scorecard and of steps in the log are compared, with factors and numbers; each
    claim has its share of the points."""
    right = ["ppo-free.kl > ppo.kl", "ppo-free.kl > 4 * ppo.kl", "ppo.kl@first < 0.6", "tiny/ppo.kl"
             "@last > 3 * tiny/ppo.kl@first", "prepare.recall > 0.5"]
    assert lost(run_folder, *right) == (4, [])
    points, lines = lost(run_folder, "ppo-free.kl > 5 * ppo.kl", right[0])
    assert points == 2 and "9.000 and 10.000" in lines[0]


@pytest.mark.parametrize("change, words", [
    (dict(data=dict(config=dict(seed=2))), "of seed 2, not of 1"),
    (dict(data=dict(tokenizer="another")), "not what prepare.py makes of seed 1"),
    (dict(card=dict(prepare=dict(recall=1.0))), "not what prepare.py makes"),
    (dict(card={"ppo-free": dict(kl=99.0)}), "scorecard and log disagree"),
    (dict(kl_coefficient=0.1), "kl_coefficient=0.1, not 0"), (dict(seed=5), "seed=5, not 1"),
    (dict(whiten_rewards=True), "whiten_rewards=True"), (dict(card=dict(ppo={})), "lacks it"),
    (dict(card=dict(ppo=[])), "lacks it")])
def test_figures_of_other_runs_are_refused(run_folder, change, words):
    """Another world, another seed, other options, a scorecard that the log does not know."""
    run_folder.write(**change)
    points, lines = lost(run_folder, "ppo-free.kl > ppo.kl")
    assert points == 0 and words in lines[0]


def test_runs_that_cannot_be_read(run_folder):
    claim = "ppo-free.kl > ppo.kl"
    run_folder.log.write_text("{")
    assert "cannot be read" in lost(run_folder, claim)[1][0]
    run_folder.log.unlink()
    assert "knows no run of ppo" in lost(run_folder, claim)[1][0]
    (run_folder.log.parent / "data.json").unlink()
    assert "out/tiny/data.json was not handed in" in lost(run_folder, claim)[1][0]


def test_tokens_may_differ_where_the_cleaning_is_the_students(run_folder):
    run_folder.write(data=dict(tokenizer="another", by_kind={"markup": "2 of 4"}))
    claim = "ppo-free.kl > ppo.kl"
    assert lost(run_folder, claim, own_cleaning=True)[0] == 4 and lost(run_folder, claim)[0] == 0
    run_folder.write(data=dict(by_kind={"markup": "3 of 5"}))
    assert lost(run_folder, claim, own_cleaning=True)[0] == 0


def test_the_options_of_every_experiment_are_there():
    """The commands of all weeks name options of the scripts, with values of their types; and that
    is what the defaults are compared with."""
    configs = dict(prepare=prepare.PrepareConfig, pretrain=pretrain.PretrainConfig,
                   sft=sft.SFTConfig, reward=reward.RewardConfig, ppo=ppo.PPOConfig)
    for unit in WEEKS:
        for command in [c for e in unit["experiment"] for c in e["run"] if c.startswith("python")]:
            stage, _, options = course_figures.parse_command(command)
            given = [f"--{name}={value}" for name, value in options.items()]
            model.load_config(configs[stage.split("-")[0]], "", given)
    assert course_figures.default_options("ppo") == vars(ppo.PPOConfig())
    assert course_figures.default_options("dpo") == {}
