"""What the core and each extra need, as `doctor` reads it from the installed metadata."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from lora_plugins.cli.requirements import requirements

PROJECT = tomllib.loads((Path(__file__).parent.parent.parent.parent / "pyproject.toml").read_text())["project"]
DECLARED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


def declared(extra):
    """The lines of an extra, with those of extras that it names."""
    for line in DECLARED.get(extra, []):
        if line.startswith("lora-plugins["):
            for named in re.findall(r"[\w-]+", line.partition("[")[2]):
                yield from declared(named)
        else:
            yield line


@pytest.mark.parametrize("extra", [*DECLARED, "no-such-extra"])
def test_each_package_of_an_extra_is_listed_with_its_versions(extra):
    expected = {re.split(r"[\[<>=]", line)[0]: set(re.findall(r"[<>=]+[\d.]+", line)) for line in declared(extra)}
    assert {needed.name: set(needed.versions.split(",")) for needed in requirements(extra)} == expected


def test_an_extra_lacks_what_an_extra_that_it_names_lacks(monkeypatch):
    present = {"fastapi": "1", "uvicorn": "1"}  # of `serve` itself; what `vision` needs is not there

    def installed(name):
        if name in present:
            return present[name]
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", installed)
    lacking = {needed.name for needed in requirements("serve") if needed.trouble}
    assert {"timm", "lightning"} <= lacking
    assert not lacking & present.keys()


def test_a_package_of_the_core_is_installed_and_quoted_for_a_shell():
    (torch,) = [needed for needed in requirements("") if needed.name == "torch"]
    assert (torch.quoted, torch.trouble) == ("'torch>=2.8'", "")
    assert torch.installed
