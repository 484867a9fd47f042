"""Do the tests bite? `python -m tests.mutants adapter merge --sample 50` changes one place at a time and runs them.

Each mutant is a copy of the installed package with one small change: a comparison turned, a condition negated, a
statement that is a call dropped, a number moved by one, a sign or an operator turned. A mutant that passes the tests
survives, and is printed: the tests lack something, or the code says more than it needs to.
"""

import argparse
import ast
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import lora_plugins

ROOT = Path(__file__).parents[1]
PACKAGE = Path(lora_plugins.__file__).parent
STATE = ("tests/state/test_found.py", "tests/state/test_interruptions.py", "tests/state/test_sequences.py")
TESTS = {
    "adapter": ("tests/core/adapter", "tests/core/test_model.py", *STATE),
    "merge": ("tests/core/merge", "tests/core/test_model.py", *STATE),
    "inplace": ("tests/core/inplace", "tests/core/layers", "tests/core/variants", *STATE),
    "plan": ("tests/core/plan", "tests/core/test_model.py"),
    "files": ("tests/core/files", "tests/core/test_model.py"),
    "kernels": ("tests/core/kernels", "tests/core/layers", "--ignore=tests/core/kernels/test_removal.py"),
}
"""By room, its own tests and those that walk through it."""

TURNED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
}
"""Operators, and what they are turned into."""


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Args:
        path: The file, relative to the package.
        number: Of the change, in the order of `changes`.
        line: Where it is.
        what: What it does, for the report.
    """

    path: Path
    number: int
    line: int
    what: str


def changes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, Callable[[], None]]]:
    """Yields every place that can be changed, what the change is, and what does it.

    Messages of errors, annotations and docstrings are left alone.
    """
    left_alone = {id(node) for part in _silent(tree) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) in left_alone:
            continue
        for field, value in ast.iter_fields(node):
            for number, part in enumerate(value if isinstance(value, list) else [value]):
                if type(part) in TURNED:
                    new = TURNED[type(part)]
                    yield node, f"{type(part).__name__} -> {new.__name__}", _put(node, field, number, new())
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield node, "condition negated", _put(node, "test", 0, ast.UnaryOp(ast.Not(), node.test))
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            yield node, f"{node.value} -> {node.value + 1}", _put(node, "value", 0, node.value + 1)
        if isinstance(node, ast.Constant) and isinstance(node.value, bool):
            yield node, f"{node.value} -> {not node.value}", _put(node, "value", 0, not node.value)
        for field in ("body", "orelse", "finalbody"):
            statements = getattr(node, field, None)
            for number, part in enumerate(statements if isinstance(statements, list) else []):
                if isinstance(part, ast.Expr) and isinstance(part.value, ast.Call):
                    yield part, f"dropped: {ast.unparse(part)}", _put(node, field, number, ast.Pass())


def _silent(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise):
            yield node
        for field in ("annotation", "returns"):
            if isinstance(part := getattr(node, field, None), ast.AST):
                yield part


def _put(node: ast.AST, field: str, number: int, new: object) -> Callable[[], None]:
    def put() -> None:
        value = getattr(node, field)
        if isinstance(value, list):
            value[number] = new
        else:
            setattr(node, field, new)

    return put


def mutants_of(path: Path) -> list[Mutant]:
    """Lists the mutants of a file of the package."""
    tree = ast.parse((PACKAGE / path).read_text())
    return [
        Mutant(path, number, getattr(node, "lineno", 0), what) for number, (node, what, _) in enumerate(changes(tree))
    ]


def _own(mutant: Mutant) -> tuple[str, ...]:
    """The tests of the file itself, which find most of its mutants and so are the first to run."""
    path = Path("tests/core") / mutant.path.with_name(f"test_{mutant.path.stem.strip('_')}.py")
    return (str(path),) if (ROOT / path).exists() else ()


def survives(mutant: Mutant, tests: tuple[str, ...], timeout: float) -> bool:
    """Runs tests on a mutant; a hang counts as found."""
    tree = ast.parse((PACKAGE / mutant.path).read_text())
    next(put for number, (_, _, put) in enumerate(changes(tree)) if number == mutant.number)()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "lora_plugins"
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        (copy / mutant.path).write_text(ast.unparse(ast.fix_missing_locations(tree)))
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        try:
            run = subprocess.run(command, capture_output=True, check=False, env=environment, cwd=ROOT, timeout=timeout)
        except subprocess.TimeoutExpired:
            return False
        return run.returncode == 0


def main() -> int:
    """Runs a sample of the mutants of some rooms; returns 1 if one survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("rooms", nargs="*", help=f"of {', '.join(TESTS)}; by default all")
    parser.add_argument("--sample", type=int, default=50, help="mutants of each room; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one mutant")
    given = parser.parse_args()
    survived = 0
    for room in given.rooms or TESTS:
        paths = [path.relative_to(PACKAGE) for path in sorted((PACKAGE / room).rglob("*.py"))]
        found = [mutant for path in paths for mutant in mutants_of(path)]
        chosen = Random(given.seed).sample(found, min(given.sample or len(found), len(found)))
        started, alive = time.perf_counter(), 0
        for mutant in chosen:
            if survives(mutant, (*_own(mutant), *TESTS[room]), given.timeout):
                alive += 1
                print(f"survived: {mutant.path}:{mutant.line}: {mutant.what}", flush=True)
        seconds = time.perf_counter() - started
        print(
            f"{room}: {len(chosen) - alive} of {len(chosen)} found, of {len(found)} in all, {seconds:.0f} s", flush=True
        )
        survived += alive
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
