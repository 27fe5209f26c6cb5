"""The limits that keep the book small, and the rules of who imports whom, as the sources have
them."""

import ast
import io
import sys
import tokenize

import pytest
from chain import ROOT, SCRIPTS

FOLDERS = [ROOT, ROOT / "data", ROOT / "tools", ROOT / "tests"]
ALL_PYTHON = sorted(path for folder in FOLDERS for path in folder.glob("*.py"))
BESIDE = [path for path in ALL_PYTHON if path.parent.name in ("data", "tools")]
BOOK = [ROOT / f"{name}.py" for name in SCRIPTS]
TRAINING = [ROOT / f"{name}.py" for name in ("model", "pretrain", "sft", "reward", "ppo")]


def names(paths):
    return [path.relative_to(ROOT).as_posix() for path in paths]


def parse(path):
    """The syntax tree, as Python 3.11 sees it."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path), feature_version=(3, 11))


def lines_of_code(source):
    """How many lines hold code: not only comments, blanks, or a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings, lines = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
             tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def count_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def imports(path):
    """What a file imports, as {module: names taken from it}; {"a": set()} is `import a`."""
    found = {}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.setdefault(alias.name, set())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.setdefault(node.module, set()).update(alias.name for alias in node.names)
    return found


def of_the_project(path):
    """The modules of the project that a file imports, with a folder's name in front:
    "data.tiny_world"."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in ALL_PYTHON}
    found = set()
    for module, taken in imports(path).items():
        found |= {module, *(f"{module}.{name}" for name in taken)} & modules
    return found


def test_lines_of_code_are_counted_right():
    """A worked example: docstrings, comments and blank lines do not count, all lines of a
    statement do."""
    source = '"""A chapter.\n\nIt begins."""\n\nx = (1,\n     2)  # two lines\n# a comment\n\n' \
             'def f():\n    """Nothing."""\n    return """a\n    b"""\n'
    assert lines_of_code(source) == 5


# --------------------------------------------------------------------------------------------------
# Size

def test_the_book_is_small():
    """The seven scripts hold at most 1,800 lines of code and 2,700 in all, and none more than
    700."""
    counts = {path.name: count_lines(path) for path in BOOK}
    code = {path.name: lines_of_code(path.read_text(encoding="utf-8")) for path in BOOK}
    assert sum(code.values()) <= 1800, (sum(code.values()), code)
    assert sum(counts.values()) <= 2700, (sum(counts.values()), counts)
    assert max(counts.values()) <= 700, counts


def test_training_is_smaller_still():
    """What one must read to understand training is at most 1,750 lines."""
    counts = {path.name: count_lines(path) for path in TRAINING}
    assert sum(counts.values()) <= 1750, (sum(counts.values()), counts)


def test_readme_is_short():
    """The README is at most 300 lines."""
    assert count_lines(ROOT / "README.md") <= 300


@pytest.mark.parametrize("path", ALL_PYTHON, ids=names(ALL_PYTHON))
def test_lines_fit_a_page(path):
    """No line is longer than 100 columns or ends in blanks; line ends are \\n, and the last one is
    there."""
    data = path.read_bytes()
    assert b"\r" not in data and b"\t" not in data and (not data or data.endswith(b"\n"))
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        assert len(line) <= 100, f"{path.name}, line {number}: {len(line)} columns"
        assert line == line.rstrip(), f"{path.name}, line {number} ends in blanks"


@pytest.mark.parametrize("path", BOOK, ids=names(BOOK))
def test_functions_and_classes_are_short(path):
    """No class is longer than 130 lines and no function than 60; a main, and the loops of
    reward.py and ppo.py, may have 80."""
    long = {"main", "reward.train", "ppo.update"}
    for node in ast.walk(parse(path)):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            limit = 80 if {node.name, f"{path.stem}.{node.name}"} & long else 60
            limit = 130 if isinstance(node, ast.ClassDef) else limit
            n = node.end_lineno - node.lineno + 1
            assert n <= limit, f"{path.name}: {node.name} has {n} lines"


# --------------------------------------------------------------------------------------------------
# Who imports whom

@pytest.mark.parametrize("path", BOOK, ids=names(BOOK))
def test_the_book_imports_only_what_it_may(path):
    """model.py imports nothing of the project, prepare.py model.py and the tiny world, and a stage
    these two; so none imports another stage or a tool."""
    may = {"model": set(), "prepare": {"model", "data.tiny_world"}}
    assert of_the_project(path) <= may.get(path.stem, {"model", "prepare"})


def test_the_tiny_world_stands_alone():
    """data/tiny_world.py imports the standard library only."""
    outside = {module.split(".")[0] for module in imports(ROOT / "data/tiny_world.py")}
    assert outside <= sys.stdlib_module_names


def test_no_import_cycles():
    """No file imports one that imports it, in however many steps."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in ALL_PYTHON}
    arrows = {module: of_the_project(path) - {module} for module, path in modules.items()}
    while arrows:
        free = [module for module in arrows if not arrows[module] & arrows.keys()]
        assert free, f"a cycle among {sorted(arrows)}"
        for module in free:
            del arrows[module]


@pytest.mark.parametrize("folder", ["data", "tools"])
def test_folders_are_packages(folder):
    """data/ and tools/ hold an empty __init__.py, so that no installed package of that name
    wins."""
    assert (ROOT / folder / "__init__.py").read_bytes() == b""


@pytest.mark.parametrize("path", BESIDE, ids=names(BESIDE))
def test_scripts_beside_the_book_find_it(path):
    """A script of data/ or tools/ that imports of the project puts its root on sys.path first."""
    inserted = False
    for node in parse(path).body:
        statement = ast.unparse(node)
        inserted = inserted or statement == "sys.path.insert(0, ROOT)"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            package = statement.split()[1].split(".")[0]
            assert inserted or package not in {"data", "tools", *SCRIPTS}, statement


# --------------------------------------------------------------------------------------------------
# What is not done

@pytest.mark.parametrize("path", BOOK, ids=names(BOOK))
def test_nothing_is_executed_from_files(path):
    """Checkpoints load as tensors and plain values only; no source calls eval or exec, or imports
    what would."""
    forbidden = {"eval", "exec", "compile", "__import__", "np.load", "pickle.load", "pickle.loads"}
    loads = 0
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            assert function not in forbidden, (function, node.lineno)
            if function == "torch.load":
                loads += 1
                assert "weights_only=True" in map(ast.unparse, node.keywords), node.lineno
    assert not {"runpy", "importlib", "marshal", "shelve"} & imports(path).keys()
    assert bool(loads) == (path.stem == "model")


@pytest.mark.parametrize("path", BOOK, ids=names(BOOK))
def test_no_error_is_hidden(path):
    """No `except` and no suppress() catches everything, or what a slip of the code raises."""
    slips = {"everything", "Exception", "BaseException", "NameError", "TypeError", "AttributeError",
             "LookupError", "KeyError"}
    for node in ast.walk(parse(path)):
        caught = []
        if isinstance(node, ast.ExceptHandler):
            caught = getattr(node.type, "elts", [node.type])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "suppress":
            caught = node.args
        assert not slips & {ast.unparse(kind) if kind else "everything" for kind in caught}, (
            node.lineno)


@pytest.mark.parametrize("path", ALL_PYTHON, ids=names(ALL_PYTHON))
def test_sources_compile_on_the_oldest_python(path):
    """Every file is one of Python 3.11, as the README promises."""
    compile(parse(path), str(path), "exec")
