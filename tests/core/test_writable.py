"""Places where something will be written are looked at before it is made."""

import os
from functools import partial

import pytest

from lora_plugins import ConfigError
from lora_plugins.writable import (
    check_space,
    check_writable_file,
    check_writable_folder,
    check_writable_place,
)

CHECKS = {"file": check_writable_file, "place": check_writable_place, "folder": check_writable_folder}
each = pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)


@each
@pytest.mark.parametrize("name", ["new", "some/new/place"])
def test_what_can_be_written_passes_and_nothing_is_made(check, name, tmp_path):
    check(tmp_path / name, "out")
    assert list(tmp_path.iterdir()) == []


@each
def test_a_file_on_the_way_is_named(check, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"out is .*file/below, and .*file is a file"):
        check(tmp_path / "file" / "below", "out")


@each
@pytest.mark.parametrize("target", ["gone", "link"], ids=["broken", "circle"])
def test_a_link_to_nothing_on_the_way_is_named(check, target, tmp_path):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(ConfigError, match=rf"out is .*link/new, and .*link is a link to {target}, which is not there"):
        check(tmp_path / "link" / "new", "out")


def test_a_link_to_nothing_is_no_folder_and_is_replaced_by_a_file(tmp_path):
    (tmp_path / "link").symlink_to("gone")
    check_writable_file(tmp_path / "link", "out")
    with pytest.raises(ConfigError, match="link is a link to gone"):
        check_writable_folder(tmp_path / "link", "out")


@each
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_closed_is_named(check, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"nothing can be written in .*closed"):
        check(tmp_path / "closed" / "new", "out")


@pytest.mark.parametrize("check", [*CHECKS.values(), partial(check_space, needed=1)], ids=[*CHECKS, "space"])
def test_a_place_that_cannot_be_looked_at_is_named(check, tmp_path):
    with pytest.raises(ConfigError, match=r"out is .*x{300}/new, which cannot be reached: File name too long"):
        check(tmp_path / ("x" * 300) / "new", setting="out")


def test_a_folder_is_no_file_and_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    check_writable_file(tmp_path / "file", "out")
    check_writable_place(tmp_path / "file", "out")
    check_writable_place(tmp_path, "out")
    check_writable_folder(tmp_path, "out")
    with pytest.raises(ConfigError, match=r"out is .*, which is a folder"):
        check_writable_file(tmp_path, "out")
    with pytest.raises(ConfigError, match=r"out is .*, which is a file"):
        check_writable_folder(tmp_path / "file", "out")


def test_a_disk_without_room_is_told(tmp_path):
    check_space(tmp_path / "new" / "file", 1, "out")
    with pytest.raises(ConfigError, match=r"takes 1,099,511,627,776\.0 MiB, and that disk has [\d,]+\.\d MiB left"):
        check_space(tmp_path / "new" / "file", 2**60, "out")
