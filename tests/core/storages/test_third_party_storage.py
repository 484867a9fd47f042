"""A storage of a third party: a real distribution, found by its entry point."""

import os
import subprocess
import sys

import pytest

from lora_plugins.plugins import STORAGES, build_registry
from lora_plugins.testing import STORAGE_CHECKS


@pytest.fixture
def registry(with_plugins):
    with_plugins("plugin_storage")
    return build_registry()


def test_it_is_listed_with_its_distribution_and_version(registry):
    (info,) = [info for info in registry.plugins if info.name == "fp8"]
    assert (info.distribution, info.version, info.names(STORAGES)) == ("lora-plugins-fp8", "0.2.0", ("fp8",))


def test_its_own_tests_pass_where_it_is_installed(installed):
    path = os.pathsep.join([str(installed("plugin_storage")), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:cacheprovider"],
        cwd=installed("plugin_storage").parent / "source",
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(STORAGE_CHECKS)} passed" in done.stdout
