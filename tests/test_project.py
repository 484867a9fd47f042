"""What the files at the top of the repository say of the project, held against the project."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


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
