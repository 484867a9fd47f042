"""The conformance kit as pytest fixtures; installed as `pytest_lora_plugins`, which pytest loads by itself.

    def test_layer(layer_check):
        layer_check(MyLayerPlugin(), MyLayer, lambda layer: torch.randn(2, 8), options=[{}, {"bias": False}])

    def test_init(init_check):
        init_check(MyInit())

    def test_variant(variant_check):
        variant_check(MyVariant())

    def test_format(format_check):
        format_check(MyFormat(), "adapter.safetensors")

    def test_storage(storage_check):
        storage_check(MyStorage())

Each check of the kit is a test of its own: `test_layer[law]`, `test_layer[gradients]` and so on. With
`pytest --lora-device cuda`, layer types, variants and storages are checked there.

pytest imports this module in every project of an environment, so it imports neither torch nor lora_plugins before one
of the fixtures is used, or a device named. That is also why it is a package of its own: importing anything below
`lora_plugins` imports torch.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import pytest

if __name__ != "pytest_lora_plugins":
    raise ImportError(f"This package was imported as {__name__!r}. Import it as 'pytest_lora_plugins'.")

CPU = "cpu"
"""Where the kit checks by default."""

SUFFIX = "_check"
"""What the names of our fixtures end with; the kind of plugins stands before it."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option; it is not called `--device`, since projects have options of that name."""
    group = parser.getgroup("lora_plugins")
    group.addoption("--lora-device", default=CPU, help="where the conformance kit of lora_plugins checks: cuda, ...")


def pytest_configure(config: pytest.Config) -> None:
    """Refuses a device that torch cannot use here, before any plugin is blamed for it."""
    device = config.getoption("--lora-device")
    if device == CPU:
        return
    from lora_plugins import ConfigError  # noqa: PLC0415
    from lora_plugins.devices import usable_device  # noqa: PLC0415

    try:
        usable_device(device, "--lora-device")
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test of each check, for tests that use a fixture of ours."""
    if not any(name.endswith(SUFFIX) for name in metafunc.fixturenames):
        return
    from lora_plugins.testing import KITS  # noqa: PLC0415

    for kit in KITS:
        if kit.fixture in metafunc.fixturenames:
            place = {"device": metafunc.config.getoption("--lora-device")} if kit.takes_device else {}
            runs = [partial(_one_check, kit.check, name, **place) for name in kit.checks]
            metafunc.parametrize(kit.fixture, runs, ids=list(kit.checks))


def _one_check(
    run: Callable[..., None], check: str, *arguments: Any, skip: Collection[str] = (), **keywords: Any
) -> None:
    if check in skip:
        pytest.skip("the test leaves this check out")
    run(*arguments, only=[check], **keywords)
