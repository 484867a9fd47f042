"""A storage of a third party: a real distribution, found by its entry point."""

import pytest

from lora_plugins.plugins import STORAGES, build_registry
from lora_plugins.testing import STORAGE_CHECKS
from tests.core.processes import run_tests


@pytest.fixture
def registry(with_plugins):
    with_plugins("plugin_storage")
    return build_registry()


def test_it_is_listed_with_its_distribution_and_version(registry):
    (info,) = [info for info in registry.plugins if info.name == "fp8"]
    assert (info.distribution, info.version, info.names(STORAGES)) == ("lora-plugins-fp8", "0.2.0", ("fp8",))


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(installed):
    site = installed("plugin_storage")
    assert f"{len(STORAGE_CHECKS)} passed" in run_tests(site.parent / "source", site)
