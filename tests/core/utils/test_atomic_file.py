"""Files that are whole or not there."""

import os
import re
from stat import S_IMODE

import pytest

from lora_plugins.utils import replace_file, replace_torch_file


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "\N{EURO SIGN}" * 83 + ".png"], ids=["one byte", "three bytes"])
def test_a_file_has_as_long_a_name_as_there_can_be(tmp_path, name):
    for data in (b"old", b"new"):
        replace_file(tmp_path / name, data)
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, data)]


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664], ids=oct)
def test_a_file_keeps_its_permissions(tmp_path, mode):
    path = tmp_path / "file"
    replace_file(path, b"old")
    path.chmod(mode)
    replace_file(path, b"new")
    assert (path.read_bytes(), S_IMODE(path.stat().st_mode)) == (b"new", mode)


@pytest.mark.parametrize(
    "write", [lambda path: replace_file(path, b"new"), lambda path: replace_torch_file(path, 1)], ids=["bytes", "torch"]
)
def test_an_error_names_the_file_that_was_to_be_written(tmp_path, write):
    path = tmp_path / "missing" / "file"
    with pytest.raises(FileNotFoundError, match=re.escape(f"'{path}'")):
        write(path)
