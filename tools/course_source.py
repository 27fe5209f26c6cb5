"""What the classroom does to source code: take the body of a function out, and put another in."""

import ast
import textwrap

# What a submitted function may import, besides the scripts that its own script imports.
MODULES = set("bisect collections functools heapq itertools math operator random re statistics "
              "unicodedata zlib numpy regex torch".split())
# Names that lead out of a function, to the reference, to files or to the grader.
FORBIDDEN = set("os sys subprocess importlib inspect builtins pickle".split())
FORBIDDEN_BUILTINS = set("open eval exec compile globals locals vars getattr setattr".split())


class Refused(Exception):
    """Why something earns no points, in one line."""


def read(path):
    """The text of a file, with \\n at the end of lines, whoever wrote it."""
    return path.read_text(encoding="utf-8").replace("\r\n", "\n")


# --------------------------------------------------------------------------------------------------
# Parts of a module

def find(tree, path):
    """The node of "function" or "Class.method" in a module; None if there is none."""
    for name in path.split("."):
        kinds = (ast.FunctionDef, ast.ClassDef)
        found = [node for node in tree.body if isinstance(node, kinds) and node.name == name]
        if not found:
            return None
        tree = found[-1]
    return tree


def lines_of(node):
    """The lines of a node, its decorators included, as a slice."""
    first = min([node.lineno] + [d.lineno for d in getattr(node, "decorator_list", [])])
    return slice(first - 1, node.end_lineno)


def function_text(source, path):
    """The text of a function, without the indentation of a method."""
    node = find(ast.parse(source), path)
    return textwrap.dedent("\n".join(source.split("\n")[lines_of(node)]))


def replaced(source, path, text):
    """A module with another text in place of a function's."""
    node, lines = find(ast.parse(source), path), source.split("\n")
    lines[lines_of(node)] = [textwrap.indent(text.strip("\n"), " " * node.col_offset)]
    return "\n".join(lines)


def stub(source, path, message):
    """A module with an exception in place of a function's body. Its docstring stays."""
    node, lines = find(ast.parse(source), path), source.split("\n")
    first = node.body[0].lineno - 1
    if ast.get_docstring(node) is not None:
        first = node.body[0].end_lineno
    indent = " " * node.body[0].col_offset
    lines[first:node.end_lineno] = [f'{indent}raise NotImplementedError("{message}")']
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# What a part needs of the others

def bound_by(statement):
    """The names that a statement at the top of a module defines."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    if isinstance(statement, (ast.Import, ast.ImportFrom)):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}


def used_by(node):
    """All names in a node, arguments included: that is how a test asks for pytest's fixtures."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    return names | {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}


def needed(statements, names):
    """Those of the statements that define these names, or what in turn they use."""
    kept, wanted = [], set(names)
    while more := [s for s in statements if s not in kept and bound_by(s) & wanted]:
        kept += more
        wanted = wanted.union(*map(used_by, more))
    return [s for s in statements if s in kept]


def only_tests(source, names):
    """A file of tests with these tests only, and whatever they use."""
    tree, lines, text = ast.parse(source), source.split("\n"), ""
    kept, before = needed(tree.body, names), 0
    for statement in tree.body:
        is_import = isinstance(statement, (ast.Import, ast.ImportFrom))
        if statement in kept or is_import or statement is tree.body[0]:
            text += "\n".join(lines[before:statement.end_lineno]) + "\n"
        before = statement.end_lineno
    return text


# --------------------------------------------------------------------------------------------------
# A student's function in the place of the reference's

def signature(node):
    """What must stay as it was: decorators, arguments and defaults. Type hints are free."""
    for arg in ast.walk(node.args):
        if isinstance(arg, ast.arg):
            arg.annotation = None
    decorators = "".join(f"@{ast.unparse(d)} " for d in node.decorator_list)
    return f"{decorators}def {node.name}({ast.unparse(node.args)})"


def imported_by(node):
    """The modules that a node imports from."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or "."] if isinstance(node, ast.ImportFrom) else []


def names_in(node):
    """The names that a single node mentions, of whatever kind."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [part for alias in node.names for part in alias.name.split(".")]
    return []


def refuse_what_is_forbidden(tree, forbidden, modules):
    """Raise Refused at code that would fetch the solution, or leave the test, instead of working.
    It keeps honest people honest: Python cannot lock up code that runs in the same process."""
    for node in ast.walk(tree):
        for module in imported_by(node):
            if module.split(".")[0] not in modules:
                raise Refused(f"it may not import {module}")
        for name in names_in(node):
            is_name = isinstance(node, ast.Name)
            private = name.startswith("__" if is_name else "_") and name != "__init__"
            builtin = is_name and name in FORBIDDEN_BUILTINS
            if private or builtin or name in FORBIDDEN | forbidden:
                raise Refused(f"it may not use {name}")


def splice(exercise, reference, source):
    """The reference's module with the function of a submitted one, and with the new names of that
    one which the function uses."""
    module, path = exercise["name"].split(".", 1)
    try:
        submitted = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise Refused(f"{module}.py{where}: {getattr(error, 'msg', error)}")
    whole = ast.parse(reference)
    old, new = find(whole, path), find(submitted, path)
    if not isinstance(new, ast.FunctionDef):
        raise Refused(f"there is no {path} in {module}.py")
    if signature(new) != signature(old):
        raise Refused(f"its first line must be {signature(old)}")

    known = set().union(*map(bound_by, whole.body))
    additions = [s for s in submitted.body if bound_by(s) - known]
    additions = needed(additions, used_by(new))
    modules = MODULES | {"model", "prepare"} - {module}
    for part in [*additions, new]:
        refuse_what_is_forbidden(part, set(exercise.get("forbid", [])), modules)

    class_name = path.rpartition(".")[0]
    parent = find(whole, class_name) if class_name else whole
    parent.body[parent.body.index(old)] = new
    at = whole.body.index(parent if class_name else new)
    whole.body[at:at] = additions
    return ast.unparse(whole)
