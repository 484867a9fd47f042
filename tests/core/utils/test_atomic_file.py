"""Files that are whole or not there."""

import pytest

from lora_plugins.utils import replace_file


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "\N{EURO SIGN}" * 83 + ".png"], ids=["one byte", "three bytes"])
def test_a_file_has_as_long_a_name_as_there_can_be(tmp_path, name):
    for data in (b"old", b"new"):
        replace_file(tmp_path / name, data)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, data)]
