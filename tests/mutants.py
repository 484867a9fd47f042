"""Do the tests bite? `python -m tests.mutants adapter merge --sample 50` changes one place at a time and runs them.

Each mutant is the package with one small change: a condition that always or never holds, one part of an `and`, `or` or
comprehension's `if` dropped, a statement that is a call or an argument given by name dropped, a comparison, a sign or
an operator turned, a number moved by one. The tests of the core, or of `integrations` or `tasks` where the room is
there, that run the changed line are run on it, those of its own file and room first, or all of its room where the line
is run by an import. A mutant that passes survives, and is printed: the tests lack something, or the code says more than
it needs to. At the end the tests that found mutants are run without one, and have to pass.

Which tests run which line is measured first, which takes as long as all those tests, several times over;
`--measured FOLDER` keeps it there, for further samples of the same code. A test that starts other processes has no
mutant in them: what survives in a room with such tests may be found by them all the same.
"""

import argparse
import ast
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.abc import MetaPathFinder, SourceLoader
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path
from random import Random
from types import CodeType

import coverage
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = Path(str(find_spec("lora_plugins").origin)).parent  # it is not imported here, but with a mutant in it
FOUND = "tests/state/test_found.py"
"""Short sequences of calls, after each of which all of a model is judged: they find most, and soon."""

STATE = (FOUND, "tests/state/test_interruptions.py", "tests/state/test_sequences.py")
ROOMS = ("adapter", "merge", "plan", "files", "inplace", "kernels", "layers", "variants", "storages")
"""Those that are looked at where none is named; any other folder of the package can be."""

APART = ("cli", "hub", "testing", "test_imports.py", "test_packaging.py", "test_rooms.py", "kernels/test_removal.py")
"""Tests of the core that start other processes, in which there is no mutant, or read the source."""

TYPES = "tests/core/test_public_types.py"
"""Asks classes what they are, and is run beside the tests of a room where a line is run by an import."""

CORE = ("tests/core", *STATE, *(f"--ignore=tests/core/{name}" for name in APART))
TESTS = {"core": CORE, "integrations": ("tests/integrations",), "tasks": ("tests/tasks",)}
"""All tests among which those that run a line are looked for."""

SLOW = {
    "core": ("numpy", "torch"),
    "integrations": ("lightning.pytorch", "torchmetrics", "transformers", "diffusers", "torchvision", "timm"),
    "tasks": ("lightning.pytorch", "torchmetrics", "transformers", "diffusers", "torchvision", "timm", "sklearn"),
}
"""What takes long to import is imported once, before each mutant's process branches off."""

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
        statement: The line where its statement begins.
        imported: Whether an import runs it, so that coverage names the test that imported the file first.
        what: What it does, for the report.
    """

    path: Path
    number: int
    line: int
    statement: int
    imported: bool
    what: str


def changes(tree: ast.Module) -> Iterator[tuple[ast.AST, str, Callable[[], None]]]:
    """Yields every place that can be changed, what the change is, and what does it.

    Messages of errors, annotations and docstrings are left alone.
    """
    left_alone = {id(node) for part in _silent(tree) for node in ast.walk(part)}
    for node in ast.walk(tree):
        if id(node) not in left_alone:
            yield from _turned(node)
            yield from _dropped(node)


def _turned(node: ast.AST) -> Iterator[tuple[ast.AST, str, Callable[[], None]]]:
    for field, value in ast.iter_fields(node):
        for number, part in enumerate(value if isinstance(value, list) else [value]):
            if type(part) in TURNED:
                new = TURNED[type(part)]
                yield node, f"{type(part).__name__} -> {new.__name__}", _put(node, field, number, new())
    if isinstance(node, ast.If | ast.IfExp):
        for always in (True, False):
            yield node, f"condition {always}", _put(node, "test", 0, ast.Constant(always))
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield node, f"{node.value} -> {node.value + 1}", _put(node, "value", 0, node.value + 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield node, f"{node.value} -> {not node.value}", _put(node, "value", 0, not node.value)


def _dropped(node: ast.AST) -> Iterator[tuple[ast.AST, str, Callable[[], None]]]:
    for number, part in enumerate(node.values if isinstance(node, ast.BoolOp) else []):
        nothing = ast.Constant(isinstance(node.op, ast.And))
        yield part, f"dropped: {ast.unparse(part)}", _put(node, "values", number, nothing)
    for field in ("keywords", "ifs"):
        for number, part in enumerate(getattr(node, field, [])):
            yield part, f"dropped: {ast.unparse(part)}", _put(node, field, slice(number, number + 1), [])
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


def _put(node: ast.AST, field: str, number: int | slice, new: object) -> Callable[[], None]:
    def put() -> None:
        value = getattr(node, field)
        if isinstance(value, list):
            value[number] = new
        else:
            setattr(node, field, new)

    return put


def _part(path: Path) -> str:
    return path.parts[0] if path.parts[0] in TESTS else "core"


def _file(path: Path) -> Path:
    """A file or folder of the package, which lies beside the core's where the checkout is installed for editing."""
    return PACKAGE / path if (PACKAGE / path).exists() else PACKAGE.parent / path


def mutants_of(path: Path) -> list[Mutant]:
    """Lists the mutants of a file of the package."""
    tree = ast.parse(_file(path).read_text())
    begins: dict[int, int] = {}
    for statement in ast.walk(tree):  # outer ones first
        if isinstance(statement, ast.stmt):
            begins |= {id(node): statement.lineno for node in ast.walk(statement)}
    functions = (each for each in ast.walk(tree) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
    called = {id(node) for function in functions for part in function.body for node in ast.walk(part)}
    return [
        Mutant(path, number, getattr(node, "lineno", 0), begins[id(node)], id(node) not in called, what)
        for number, (node, what, _) in enumerate(changes(tree))
    ]


def found_by(mutant: Mutant | None, tests: Sequence[str], timeout: float, note: Path) -> str | None:
    """Runs tests on a mutant, in a copy of this process that has not imported the package.

    Args:
        mutant: The mutant; None for the package as it is.
        tests: Names of tests, as pytest takes them.
        timeout: Seconds; a hang counts as found.
        note: A file that the copy writes into.

    Returns:
        The test that failed, or what happened instead; None where all pass.
    """
    note.write_text("the import")
    child = os.fork()
    if not child:
        os._exit(_run(mutant, tests, note))
    ended = time.monotonic() + timeout
    while time.monotonic() < ended:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return None if os.waitstatus_to_exitcode(status) == 0 else note.read_text()
        time.sleep(0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "a hang"


def _run(mutant: Mutant | None, tests: Sequence[str], note: Path) -> int:
    if mutant is not None:
        sys.meta_path.insert(0, _Finder(mutant))
    for output in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    # Rewriting assertions would load our modules, which include a plugin of pytest, in the mutant's place.
    return int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--assert=plain", *tests], [_Note(note)]))


class _Note:
    """A plugin of pytest that writes down which test failed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self._path.write_text(report.nodeid)


class _Finder(MetaPathFinder, SourceLoader):
    """Imports the mutant in the place of its file."""

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant
        self._name = ".".join(("lora_plugins", *mutant.path.with_suffix("").parts)).removesuffix(".__init__")

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        file = _file(self._mutant.path)
        places = [str(file.parent)] if file.name == "__init__.py" else None
        if fullname != self._name:
            return None
        return spec_from_file_location(fullname, file, loader=self, submodule_search_locations=places)

    def get_filename(self, fullname: str) -> str:
        return str(_file(self._mutant.path))

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def get_code(self, fullname: str) -> CodeType:
        tree = ast.parse(_file(self._mutant.path).read_text())
        next(put for number, (_, _, put) in enumerate(changes(tree)) if number == self._mutant.number)()
        return compile(ast.fix_missing_locations(tree), self.get_filename(fullname), "exec")


class Coverage:
    """Which tests run which lines.

    Args:
        folder: Where the measurement is kept; it is made if it is not there.
        part: The core, or what lies beside it.
    """

    def __init__(self, folder: Path, part: str) -> None:
        measured = folder / f"measured_{part}"
        if not measured.exists():
            _measure(folder, measured, part)
        data = coverage.CoverageData(str(measured))
        data.read()
        self._contexts = {path: data.contexts_by_lineno(path) for path in data.measured_files()}
        data.close(force=True)

    def tests(self, mutant: Mutant, most: int) -> list[str]:
        """At most so many tests that run a line: those of its own file, `FOUND`, its room, then others at random.

        Where an import runs it, they are all tests of its room.
        """
        contexts = self._contexts.get(str(_file(mutant.path)), {})
        ran = {*contexts.get(mutant.line, []), *contexts.get(mutant.statement, [])}
        named = [] if mutant.imported else sorted(ran - {""})
        Random(0).shuffle(named)
        core = _part(mutant.path) == "core"
        room = _tests_beside(Path("core", mutant.path) if core else mutant.path)
        own = f"/test_{mutant.path.stem.strip('_')}.py"
        return sorted(named, key=lambda test: (own not in test, FOUND not in test, room not in test))[:most] or [
            room,
            *([TYPES] if core else []),
        ]


def _tests_beside(path: Path) -> str:
    """Returns the tests that mirror a source file: its own, or those of the nearest folder that has some."""
    own = Path("tests", path.parent, f"test_{path.stem.strip('_')}.py")
    places = [own, *own.parents] if len(path.parts) == 2 else own.parents
    return str(next(place for place in places if (ROOT / place).exists()))


def _measure(folder: Path, measured: Path, part: str) -> None:
    options, data = folder / "options.ini", folder / "running"
    source = PACKAGE if part == "core" else _file(Path(part))
    options.write_text(f"[run]\ndata_file = {data}\nsource = {source}\n")
    command = [sys.executable, "-m", "coverage", "run", f"--rcfile={options}"]
    command += ["-m", "pytest", "-q", "-p", "tests.mutants", *TESTS[part]]
    environment = {**os.environ, "COVERAGE_CORE": "ctrace"}  # the faster one does not tell tests apart
    with (folder / "output.txt").open("w") as output:
        code = subprocess.run(command, env=environment, cwd=ROOT, stdout=output, check=False).returncode
    if code:
        raise SystemExit(f"The tests fail without a mutant: {(folder / 'output.txt').read_text()[-2000:]}")
    data.rename(measured)


def pytest_runtest_logstart(nodeid: str) -> None:
    """Tells coverage which test runs from here on: `_measure` makes this file a plugin of pytest."""
    coverage.Coverage.current().switch_context(nodeid.partition("[")[0])


def _room(parser: argparse.ArgumentParser, name: str) -> Path:
    """Returns a folder or file of the package; ends with a message where there is none of that name."""
    room, tops = Path(name), {part: _file(part) for part in map(Path, ("", "integrations", "tasks"))}
    files = {part / path.relative_to(top) for part, top in tops.items() for path in top.rglob("*.py")}
    known = files | {file.parent for file in files} - {Path()}
    if room not in known:
        from lora_plugins.errors import near  # it ends here, and no mutant has to be imported any more

        alike = [str(each) for each in known if each.suffix == room.suffix]
        parser.error(f"{name!r} is no folder or file of the package. {near(name, alike)}")
    return room


def main() -> int:
    """Runs a sample of the mutants of some rooms; returns 1 if one survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("rooms", nargs="*", help=f"folders of the package; by default {', '.join(ROOMS)}")
    parser.add_argument("--sample", type=int, default=50, help="mutants of each room; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", type=int, default=200, help="tests for one mutant, at most")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for the tests of one mutant")
    parser.add_argument("--measured", type=Path, help="a folder that keeps which tests run which line")
    given = parser.parse_args()
    survived, finders = 0, set()
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "note")
        rooms = [_room(parser, room) for room in given.rooms or ROOMS]
        covering = {part: Coverage(given.measured or Path(folder), part) for part in {_part(room) for room in rooms}}
        for name in {name for part in covering for name in SLOW[part]}:
            import_module(name)
        for room in rooms:
            top = _file(room)
            paths = [room / path.relative_to(top) for path in sorted(top.rglob("*.py")) or [top]]
            every = [mutant for path in paths for mutant in mutants_of(path)]
            chosen = Random(given.seed).sample(every, min(given.sample or len(every), len(every)))
            started, alive = time.perf_counter(), 0
            for mutant in chosen:
                tests = covering[_part(room)].tests(mutant, given.tests)
                finder = found_by(mutant, tests, given.timeout, note)
                if finder is not None and "::" in finder:
                    finders.add(finder)
                    continue
                alive += finder is None
                print(f"{finder or 'survived'}: {mutant.path}:{mutant.line}: {mutant.what}", flush=True)
            found, seconds = len(chosen) - alive, time.perf_counter() - started
            print(f"{room}: {found} of {len(chosen)} found, of {len(every)} in all, {seconds:.0f} s", flush=True)
            survived += alive
        failed = found_by(None, sorted(finders), 10 * given.timeout, note) if finders else None
    if failed is not None:
        print(f"{failed} fails without a mutant too: what it found may not be found")
    return 1 if survived or failed else 0


if __name__ == "__main__":
    sys.exit(main())
