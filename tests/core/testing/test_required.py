"""What every check compares with."""

import pytest
import torch

from lora_plugins.testing.required import MismatchError, require_close


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        pytest.param([1 + 2j], [1 + 3j], id="complex"),
        pytest.param([True, False], [True, True], id="bool"),
        pytest.param([1, 2], [1, 3], id="int"),
        pytest.param([1.0, torch.inf], [1.0, 2.0], id="infinite"),
    ],
)
def test_values_that_differ_are_told_whatever_their_type(got, expected):
    with pytest.raises(MismatchError, match=r"the output differs by up to (1|inf)"):
        require_close("the output", torch.tensor(got), torch.tensor(expected))
    require_close("the output", torch.tensor(got), torch.tensor(got))
