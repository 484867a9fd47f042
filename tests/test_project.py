"""What the files at the top of the repository say of the project, held against the project."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOWNCRIER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


FOLDERS = [
    ".ci", ".github", "benchmarks", "changelog.d", "docs", "integrations", "lora_plugins", "tasks", "tests",
]  # fmt: skip


def test_nothing_else_is_committed_beside_the_folders_of_the_project():
    git = shutil.which("git")
    listed = git and subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if not listed or not listed.stdout:  # as of sources that were unpacked inside of another checkout
        pytest.skip("this is no checkout that git reads")
    tops = {path.partition("/")[0] for path in listed.stdout.split("\0") if "/" in path}
    assert sorted(tops) == FOLDERS


def oldest(requirement: str) -> tuple[str, str]:
    """The name of a package, and the lower end of its range."""
    parsed = Requirement(requirement)
    (version,) = [specifier.version for specifier in parsed.specifier if specifier.operator == ">="]
    return parsed.name, version


def test_the_floor_is_the_lower_end_of_every_range():
    extras = PROJECT["optional-dependencies"]
    ranges = [*PROJECT["dependencies"], *extras["lightning"], *extras["testing"]]
    expected = dict(oldest(requirement) for requirement in ranges)
    lines = [line for line in (ROOT / ".ci" / "floor.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    width = {name: version.count(".") for name, version in expected.items()}
    assert pins.keys() == expected.keys()
    padded = {name: f"{version}{'.0' * (pins[name].count('.') - width[name])}" for name, version in expected.items()}
    assert pins == padded
    assert list(pins) == sorted(pins)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


@pytest.mark.parametrize("job", ["test", "core"])
def test_the_workflow_runs_every_python_that_is_claimed(job):
    prefix = "Programming Language :: Python :: "
    claimed = [line.removeprefix(prefix) for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert WORKFLOW["jobs"][job]["strategy"]["matrix"]["python"] == claimed


def test_the_workflow_makes_what_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    steps = [step.get("run", "") for job in WORKFLOW["jobs"].values() for step in job["steps"]]
    made = {word for run in steps for word in re.findall(r"\bmake ([\w-]+)", run)}
    assert made - targets == set()
    assert {"lint", "test", "test-core", "test-floor"} <= made


def test_every_room_of_the_core_has_a_line():
    rooms = {f"{path.parent.name}/" for path in (ROOT / "lora_plugins").glob("*/__init__.py")}
    table = "\n".join(line.partition("|")[2].partition("|")[0] for line in CONTRIBUTING.splitlines() if line[:1] == "|")
    assert rooms - set(re.findall(r"`([\w]+/)`", table)) == set()


@pytest.mark.parametrize(
    ("room", "meant"), [("adaptor", "adapter"), ("tasks/dta", "tasks/data"), ("modle.py", "model.py")]
)
def test_a_room_of_mutants_that_is_none_is_told(room, meant, monkeypatch, capsys):
    from tests.mutants import main

    monkeypatch.setattr(sys, "argv", ["mutants", room])
    with pytest.raises(SystemExit):
        main()
    assert f"'{room}' is no folder or file of the package. Did you mean '{meant}'" in capsys.readouterr().err


def test_changelog_fragments_have_a_kind():
    kinds = "|".join(kind["directory"] for kind in TOWNCRIER["type"])
    names = [path.name for path in (ROOT / "changelog.d").iterdir() if path.name != "README.md"]
    assert [name for name in names if not re.fullmatch(rf"\+[\w-]+\.({kinds})\.md", name)] == []
