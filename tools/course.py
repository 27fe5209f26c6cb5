"""The classroom: assignments made out of the project's own functions, graded by its own tests.

    python tools/course.py handout 5 ../week5 --student=ann    week 5 to solve
    python tools/course.py grade 5 ../week5 results.json       a table, and the JSON of Gradescope
    python tools/course.py check                               stubs earn nothing, the reference all

A handout is the project without the bodies of one week's functions. Grading puts each function that
comes back into a fresh copy of the project, and runs this function's tests there in a process of
their own: a broken function costs its own points only. With --student=ann it also reads the run
folders in out/: do their figures belong to ann's world, and do they show what they should? Instead
of the number of a week, `handout` and `grade` take the name of a project (dpo, grpo, …), which is
graded by figures alone.

course.toml says what each week asks for, course_hidden.py holds the tests that are not handed out.
Source code is handled in course_source.py, tests are run in course_run.py, figures are judged in
course_figures.py.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import secrets
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from tools.course_figures import grade_experiments  # noqa: E402
from tools.course_run import BOOK, HIDDEN, PROJECT, fresh_copy, run_tests, test_id  # noqa: E402
from tools.course_source import (Refused, function_text, only_tests, read, replaced,  # noqa: E402
                                 splice, stub)

COURSE = tomllib.loads(read(PROJECT / "tools/course.toml"))
TESTS_NEED = ("conftest.py", "helpers.py", "chain.py", "forks.py", "requirements.txt")


def find_unit(name):
    """The week of this number, or the project of this name."""
    units = {str(week["number"]): week for week in COURSE["week"]}
    units |= {project["name"]: project for project in COURSE["project"]}
    if name not in units:
        raise SystemExit(f"there is no week or project {name}: choose from {', '.join(units)}")
    return units[name]


def seed_of(student):
    """The seed of a student's own world, which depends on the name alone."""
    name = student.strip().lower().encode()
    return int(hashlib.sha256(name).hexdigest(), 16) % 10**9


def split(exercise):
    """("ppo.py", "gae") of the exercise ppo.gae."""
    module, path = exercise["name"].split(".", 1)
    return f"{module}.py", path


# --------------------------------------------------------------------------------------------------
# Handing out

def handed_out_tests(last_week):
    """{file name: text} of the public tests of all weeks up to this one."""
    names = {}
    for week in COURSE["week"]:
        if week["number"] <= last_week:
            for test in [test for exercise in week["exercise"] for test in exercise["tests"]]:
                file, name = test.split(".")
                names.setdefault(f"{file}.py", []).append(name)
    return {file: only_tests(read(PROJECT / "tests" / file), names[file]) for file in names}


def public_files():
    """{name: text} of what every handout holds: no history, no compiled files, no course files."""
    paths = [PROJECT / name for name in (*BOOK, "README.md", "LICENSE", "requirements.txt")]
    paths += [*PROJECT.glob("configs/*.toml"), *PROJECT.glob("data/*.py"),
              *PROJECT.glob("data/*.toml"), *PROJECT.glob("tools/*.py"),
              *PROJECT.glob("tools/*.html")]
    paths += [PROJECT / "tests" / name for name in TESTS_NEED]
    names = [path.relative_to(PROJECT).as_posix() for path in paths]
    return {name: read(PROJECT / name) for name in names if not name.startswith("tools/course")}


def handout(args):
    unit = find_unit(args.unit)
    if args.folder.exists():
        raise SystemExit(f"{args.folder} is there already: remove it, or name another folder")
    files = public_files()
    for exercise in unit.get("exercise", []):
        file, path = split(exercise)
        files[file] = stub(files[file], path, f"{path}: {exercise['points']} points")
    for name, text in handed_out_tests(unit.get("number", 0)).items():
        files[f"tests/{name}"] = text
    if skeleton := unit.get("skeleton"):
        files[skeleton] = read(PROJECT / "tools/skeletons" / skeleton)
    files["mine.toml"] = f"# The world of {args.student}\nseed = {seed_of(args.student)}\n"
    files["WEEK.md"] = week_text(unit, args.student)
    for name, text in files.items():
        path = args.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{args.folder}: {unit['title']}, for {args.student}; it begins in WEEK.md")


def experiment_row(experiment):
    """An experiment as a row of the README's table."""
    commands = "<br>".join(f"`{command}`" for command in experiment["run"])
    return f"| {commands} | {experiment['look']} | {experiment['next']} |"


def week_text(unit, student):
    """WEEK.md: what to learn, to write, to run and to hand in."""
    parts = [f"# {unit['title']}", unit["teaches"], COURSE["rules"]]
    if "exercise" in unit:
        parts += ["## Functions", COURSE["functions"]]
    for exercise in unit.get("exercise", []):
        file, path = split(exercise)
        without = f", without {', '.join(exercise['forbid'])}" if "forbid" in exercise else ""
        parts += [f"**{path}** in {file}: {exercise['points']} points{without}",
                  f"    python -m pytest -q {' '.join(map(test_id, exercise['tests']))}",
                  exercise.get("hint", "")]
    parts += ["## Figures", COURSE["figures"]]
    for experiment in unit["experiment"]:
        commands = [c.replace(".py", ".py --config=mine.toml") for c in experiment["run"]]
        parts += [f"**{experiment['name']}**: {experiment['points']} points",
                  "\n".join(f"    {command}" for command in commands),
                  f"Look at {experiment['look']}. Graded by:",
                  "\n".join(f"    {claim}" for claim in experiment["shows"]),
                  f"To vary next: {experiment['next']}"]
    text = "\n\n".join(part.strip("\n") for part in parts if part) + "\n"
    return text.replace("{student}", student).replace("{seed}", str(seed_of(student)))


# --------------------------------------------------------------------------------------------------
# Grading

def grade_exercise(exercise, source, edited=(), secret="0", limit=30):
    """(points, lines that say what was lost) of a function in the source that was submitted."""
    tests = [*exercise["tests"], *exercise.get("withheld", []), HIDDEN]
    try:
        for test in exercise["tests"]:
            if (file := test.split(".")[0] + ".py") in edited:
                raise Refused(f"tests/{file} was edited: hand it in as it came, or leave it out")
        file, _ = split(exercise)
        if source is None:
            raise Refused(f"there is no {file}, or it is not a text in UTF-8")
        spliced = splice(exercise, read(PROJECT / file), source)
        with tempfile.TemporaryDirectory(prefix="course-") as folder:
            folder = Path(folder)
            fresh_copy(folder)
            (folder / file).write_text(spliced, encoding="utf-8")
            faults = run_tests(folder, tests, limit, COURSE_SECRET=secret, COURSE_REFERENCE=ROOT,
                               COURSE_EXERCISE=exercise["name"])
    except Refused as reason:
        return 0, [str(reason)]
    lost = [f"{test.split('.')[1]}: {fault}" for test, fault in faults.items() if fault]
    return round(exercise["points"] * (1 - len(lost) / len(tests)), 2), lost


def submitted(path):
    """The text of a file that was handed in, or None."""
    try:
        return read(path)
    except (OSError, UnicodeDecodeError):
        return None


def grade_all(unit, args, secret):
    """Yields (name, points, points at most, lines) of each function and each experiment."""
    tests = handed_out_tests(unit.get("number", 0))
    edited = [name for name in tests
              if submitted(args.folder / "tests" / name) not in (None, tests[name])]
    for exercise in unit.get("exercise", []):
        file, path = split(exercise)
        source = submitted(args.folder / file)
        points, lost = grade_exercise(exercise, source, edited, secret, args.limit)
        yield f"{path} ({file})", points, exercise["points"], lost
    if args.student:
        yield from grade_experiments(unit, args.folder, seed_of(args.student))


def need_packages():
    """Without them every test would fail, and every student earn nothing."""
    for name in ("torch", "numpy", "tiktoken", "pytest"):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{sys.executable} has no {name}: "
                             "pip install -r requirements.txt pytest")


def grade(args):
    need_packages()
    unit, started, secret = find_unit(args.unit), time.time(), args.secret or secrets.token_hex(8)
    if not args.folder.is_dir():
        raise SystemExit(f"{args.folder} is no folder: name the one that was handed in")
    if args.results.exists():
        raise SystemExit(f"{args.results} is there already: remove it, or name another file")
    tests, score, most = [], 0, 0
    for name, points, of, lines in grade_all(unit, args, secret):
        tests.append(dict(name=name, score=points, max_score=of, output="\n".join(lines)))
        score, most = score + points, most + of
        print(f"{name:44} {points:5g} of {of:2}  {lines[0][:100] if lines else ''}", flush=True)
    results = dict(score=round(score, 2), tests=tests)
    args.results.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    print(f"{score:g} of {most} points, in {time.time() - started:.0f} s; --secret={secret}")
    if not args.student:
        print("figures were not graded: that needs --student=NAME, the one whose world it is")


# --------------------------------------------------------------------------------------------------
# Checking the course

def check_exercise(exercise):
    """(line of the table, whether the exercise is sound)."""
    file, path = split(exercise)
    source = read(PROJECT / file)
    solution = exercise.get("solution", function_text(source, path))
    if solution.count(exercise["replace"]) != 1:
        return f"{exercise['name']}: {exercise['replace']!r} must stand in it once", False
    broken = solution.replace(exercise["replace"], exercise["by"])
    stubbed, _ = grade_exercise(exercise, stub(source, path, "nothing"))
    solved, lost = grade_exercise(exercise, replaced(source, path, solution))
    mistaken, _ = grade_exercise(exercise, replaced(source, path, broken))
    sound = stubbed == 0 and solved == exercise["points"] and mistaken < solved
    line = f"{exercise['name']:36} stub {stubbed:3g}  solved {solved:3g}  mistake {mistaken:4g}"
    return f"{line} of {exercise['points']:2}  {'; '.join(lost)}", sound


def check(args):
    """For every exercise: the stub earns nothing, the reference everything, and the typical mistake
    loses points."""
    need_packages()
    weeks = [week for week in COURSE["week"] if args.week in (0, week["number"])]
    exercises = [exercise for week in weeks for exercise in week["exercise"]]
    n_unsound = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for line, sound in pool.map(check_exercise, exercises):
            print(f"{line}{'' if sound else '  UNSOUND'}", flush=True)
            n_unsound += not sound
    points = sum(exercise["points"] for exercise in exercises)
    if n_unsound or not exercises:
        raise SystemExit(f"{n_unsound} of {len(exercises)} exercises are unsound")
    print(f"{len(exercises)} exercises of {points} points are sound")


def main():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function in (handout, grade, check):
        command = commands.add_parser(function.__name__, allow_abbrev=False)
        command.set_defaults(function=function)
        if function is not check:
            command.add_argument("unit", help="the number of a week, or the name of a project")
            command.add_argument("folder", type=Path, help="the student's folder")
            command.add_argument("--student", required=function is handout, help="the name")
        if function is grade:
            command.add_argument("results", type=Path, help="the JSON file to write")
            command.add_argument("--secret", help="seeds the hidden tests; default: a random one")
            command.add_argument("--limit", type=int, default=30, help="seconds for a function")
        if function is check:
            command.add_argument("--week", type=int, default=0, help="this week only")
            command.add_argument("--jobs", type=int, default=1, help="exercises at once")
    args = parser.parse_args()
    args.function(args)


if __name__ == "__main__":
    main()
