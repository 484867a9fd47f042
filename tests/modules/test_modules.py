"""Each class is fitted with the callback, resumed, validated in a fresh module, loaded and merged.

Runs in an environment with the packages: `make test-modules`.
"""

import pytest

from lora_plugins import LoraError
from lora_plugins.integrations.lightning import alias_pytorch_lightning

pytestmark = [pytest.mark.modules, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module", autouse=True)
def _one_lightning():
    alias_pytorch_lightning()


def _parameters():
    from tests.modules.case import STEPS
    from tests.modules.cases import CASES

    for case in CASES.values():
        for step in STEPS:
            known = pytest.mark.xfail(reason=case.expected.get(step), raises=(LoraError, AttributeError))
            yield pytest.param(case, step, id=f"{case.id}-{step}", marks=[known] if step in case.expected else [])


@pytest.mark.parametrize(("case", "step"), list(_parameters()))
def test_module(case, step):
    from tests.modules.case import check

    pytest.importorskip(case.imported)
    check(case, step)
