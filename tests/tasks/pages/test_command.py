"""`lora-plugins report compare RUN RUN ... --out FILE`."""

from dataclasses import replace

import pytest

from lora_plugins.cli.main import main
from lora_plugins.tasks.pages import run_as_json

from .conftest import run_of


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A function that writes runs into folders of the current one."""
    monkeypatch.chdir(tmp_path)

    def write(**runs):
        for name, run in runs.items():
            (tmp_path / name).mkdir()
            (tmp_path / name / "report.json").write_text(run_as_json(run))

    return write


FULL = replace(run_of(), method="full fine-tuning")


def test_runs_are_put_side_by_side(folders, tmp_path, capsys):
    folders(lora=run_of(), full=FULL)
    assert main(["report", "compare", "lora", "full/report.json", "--out", "new/page.html"]) == 0
    printed = capsys.readouterr().out
    assert "LoRA, r=8         Mean IoU 82.5%, 1,000 trained (5.0%)" in printed
    assert "note:" not in printed
    text = (tmp_path / "new" / "page.html").read_text()
    assert "full fine-tuning" in text
    assert "Compare with care" not in text


def test_the_page_lies_below_the_own_home(folders, tmp_path, monkeypatch):
    folders(lora=run_of(), full=FULL)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["report", "compare", "lora", "full", "--out=~/new/page.html"]) == 0
    assert (tmp_path / "new" / "page.html").exists()


def test_runs_of_one_method_are_told_apart_by_their_place(folders, tmp_path):
    folders(one=run_of(), two=run_of(), full=FULL)
    assert main(["report", "compare", "one", "two", "full"]) == 0
    text = (tmp_path / "comparison.html").read_text()
    assert "LoRA, r=8 (one)" in text
    assert "LoRA, r=8 (two)" in text
    assert "full fine-tuning (full)" not in text


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"data": "Others"}, "data"),
        ({"model": "unet"}, "networks"),
        ({"classes": run_of().classes[:2]}, "classes"),
        ({"facts": {"Training": {"epochs": "9"}}}, "numbers of epochs"),
    ],
    ids=["data", "network", "classes", "epochs"],
)
def test_what_keeps_runs_from_being_comparable_is_said(folders, tmp_path, capsys, changes, note):
    folders(one=run_of(), two=replace(FULL, **changes))
    assert main(["report", "compare", "one", "two"]) == 0
    assert f"note: The runs have different {note}." in capsys.readouterr().out
    assert f"The runs have different {note}." in (tmp_path / "comparison.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "one is one run. Name two or more"),
        (["one", "one/"], "one is one run. Name two or more"),
        (["one", "one/report.json", "one/report.html"], "one is one run. Name two or more"),
        (["one", "two", "--out", "two/report.html"], "--out two/report.html is a report that is compared"),
        (["one", "two", "--out", "two/report.json"], "--out two/report.json is a report that is compared"),
        (["one", "nothing"], "There is no report in nothing"),
        (["one", "labels"], "one is measured by mean_iou, labels by accuracy"),
        (["one", "two", "--out", "one"], "--out is one, which is a folder. Name a file."),
        (["one", "two", "--out", "one/report.json/x.html"], "one/report.json is a file. Name another place."),
        (["one", "two", "--out", "/proc/x.html"], "nothing can be written in /proc: No such file or directory. Name"),
    ],
    ids=[
        "one",
        "one twice",
        "one by all its names",
        "over a report",
        "over its numbers",
        "missing",
        "another task",
        "a folder",
        "below a file",
        "where nothing can be written",
    ],
)
def test_what_cannot_be_compared(folders, arguments, message, capsys):
    folders(one=run_of(), two=FULL, labels=run_of(per_pixel=False))
    assert main(["report", "compare", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_without_arguments_it_says_what_there_is(capsys):
    with pytest.raises(SystemExit):
        main(["report", "--help"])
    assert "compare" in capsys.readouterr().out
