"""What the core and each extra need, as `doctor` reads it from the installed metadata."""

import re
import tomllib
from pathlib import Path

import pytest

from lora_plugins.cli.requirements import requirements

PROJECT = tomllib.loads((Path(__file__).parent.parent.parent.parent / "pyproject.toml").read_text())["project"]
DECLARED = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}


@pytest.mark.parametrize("extra", [*DECLARED, "no-such-extra"])
def test_each_package_of_an_extra_is_listed_with_its_versions(extra):
    lines = [line for line in DECLARED.get(extra, []) if not line.startswith("lora-plugins[")]
    expected = {re.split(r"[\[<>=]", line)[0]: set(re.findall(r"[<>=]+[\d.]+", line)) for line in lines}
    assert {needed.name: set(needed.versions.split(",")) for needed in requirements(extra)} == expected


def test_a_package_of_the_core_is_installed_and_quoted_for_a_shell():
    (torch,) = [needed for needed in requirements("") if needed.name == "torch"]
    assert (torch.quoted, torch.trouble) == ("'torch>=2.8'", "")
    assert torch.installed
