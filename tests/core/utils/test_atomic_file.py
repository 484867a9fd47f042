"""Files that are whole or not there."""

import os
import re
import subprocess
import sys
from stat import S_IMODE

import pytest

from lora_plugins.utils import folder_beside, replace_file, replace_torch_file


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


KILLED = """
import os, sys
from pathlib import Path
from lora_plugins.utils import folder_beside
with folder_beside(Path(sys.argv[1])) as folder:
    (folder / "part").write_text("half")
    os._exit(9)
"""


@pytest.mark.skipif(os.name != "posix", reason="processes of POSIX")
def test_a_folder_that_a_killed_process_leaves_is_removed_by_the_next(tmp_path):
    path = tmp_path / "made"
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    ((left, inside),) = [(each.name, [*each.iterdir()]) for each in tmp_path.iterdir()]
    assert left.startswith(".made.")
    assert len(inside) == 1
    with folder_beside(path) as folder:
        (folder / "part").write_text("whole")
        (folder / "part").replace(path)
    assert [each.name for each in tmp_path.iterdir()] == ["made"]
    assert path.read_text() == "whole"
