"""How the classroom runs the tests of a function: in a copy of the project, in a process of their
own, which may end as it likes."""

import os
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from tools.course_source import Refused  # noqa: E402

PROJECT = Path(ROOT)
BOOK = [f"{name}.py" for name in ("prepare", "model", "pretrain", "sft", "reward", "ppo", "sample")]
HIDDEN = "course_hidden.test_against_the_reference"


def test_id(test):
    """A test as pytest calls it: tests/test_rlhf.py::test_gae_by_hand."""
    file, name = test.split(".")
    return f"{'tools' if test == HIDDEN else 'tests'}/{file}.py::{name}"


def fresh_copy(folder):
    """Copy into an empty folder what the tests of a function need of the project."""
    for name in ("data", "tests", "tools"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PROJECT / name, folder / name, ignore=ignore)
    for name in BOOK:
        shutil.copy(PROJECT / name, folder)


def run_tests(folder, tests, limit, **environment):
    """Run tests of a project in a process of their own: {test: what is wrong, "" if it passed}.
    All cases of a test must pass: it is the whole test that counts."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               f"--junitxml={report}", *map(test_id, tests)]
    settings = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", PYTHONDONTWRITEBYTECODE="1",
                    PYTHONPATH="", PYTEST_ADDOPTS="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    process = subprocess.Popen(command, cwd=folder, env=os.environ | settings | environment,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        raise Refused(f"its tests did not end within {limit} seconds")
    finally:
        kill(process)
    if not report.exists():
        raise Refused(f"the process ended before its tests did, with exit code {code}")
    faults = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname').split('.')[-1]}.{case.get('name').partition('[')[0]}"
        wrong = [child.get("message", "").split("\n")[0] or child.tag for child in case]
        faults[name] = faults.get(name) or "; ".join(wrong)
    broken = next((fault for name, fault in faults.items() if name not in tests and fault), "")
    return {test: faults.get(test, broken or "it did not run") for test in tests}


def kill(process):
    """End a process and all that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    except ProcessLookupError:
        pass  # all of them have ended
    process.wait()
