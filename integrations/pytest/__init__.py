"""The conformance kit as pytest fixtures; installed as `pytest_lora_plugins`, which pytest loads by itself.

    def test_layer(layer_check):
        layer_check(MyLayerPlugin(), MyLayer, lambda layer: torch.randn(2, 8), options=[{}, {"bias": False}])

    def test_init(init_check):
        init_check(MyInit())

    def test_variant(variant_check):
        variant_check(MyVariant())

Each check of the kit is a test of its own: `test_layer[law]`, `test_layer[gradients]` and so on.

pytest imports this module in every project of an environment, so it imports neither torch nor lora_plugins before one
of the fixtures is used. That is also why it is a package of its own: importing anything below `lora_plugins` imports
torch.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import pytest

if __name__ != "pytest_lora_plugins":
    raise ImportError(f"This package was imported as {__name__!r}. Import it as 'pytest_lora_plugins'.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Makes one test of each check, for tests that use a fixture of ours."""
    for fixture in {"layer_check", "init_check", "variant_check"} & set(metafunc.fixturenames):
        from lora_plugins import testing  # noqa: PLC0415

        checks = {
            "layer_check": list(testing.LAYER_CHECKS),
            "init_check": list(testing.INIT_CHECKS),
            "variant_check": list(testing.VARIANT_CHECKS),
        }
        metafunc.parametrize(fixture, checks[fixture], indirect=True)


@pytest.fixture
def layer_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`lora_plugins.testing.check_layer_plugin`, which runs one check in each test."""
    from lora_plugins.testing import check_layer_plugin  # noqa: PLC0415

    return partial(_one_check, check_layer_plugin, request.param)


@pytest.fixture
def init_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`lora_plugins.testing.check_init_plugin`, which runs one check in each test."""
    from lora_plugins.testing import check_init_plugin  # noqa: PLC0415

    return partial(_one_check, check_init_plugin, request.param)


@pytest.fixture
def variant_check(request: pytest.FixtureRequest) -> Callable[..., None]:
    """`lora_plugins.testing.check_variant_plugin`, which runs one check in each test."""
    from lora_plugins.testing import check_variant_plugin  # noqa: PLC0415

    return partial(_one_check, check_variant_plugin, request.param)


def _one_check(
    run: Callable[..., None], check: str, *arguments: Any, skip: Collection[str] = (), **keywords: Any
) -> None:
    if check in skip:
        pytest.skip("the test leaves this check out")
    run(*arguments, only=[check], **keywords)
