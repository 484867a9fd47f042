"""Runs as JSON."""

import json
import math
from dataclasses import replace

import pytest

from lora_plugins.tasks import ReportError
from lora_plugins.tasks.pages import Metric, as_stored, read_run, run_as_json

from .conftest import run_of


@pytest.mark.parametrize("name", ["", "report.html", "report.HTML", "report.json"])
def test_a_run_is_read_as_it_was_written(tmp_path, name):
    (tmp_path / "report.json").write_text(run_as_json(run_of()))
    assert read_run(tmp_path / name) == run_of()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_numbers_that_json_does_not_have_are_none(value):
    run = replace(run_of(), metrics={"mean_iou": Metric(0.5, value)}, history={"val/loss": ((1.0, value),)})
    json.loads(run_as_json(run), parse_constant=pytest.fail)
    assert as_stored(run).metrics["mean_iou"] == Metric(0.5, None)
    assert as_stored(run).history["val/loss"] == ((1.0, None),)


def changed(**changes):
    return json.dumps({**json.loads(run_as_json(run_of())), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"There is no report in .*HtmlReport writes it"),
        ("{", "cannot be read"),
        ("[1]", "is no report of lora_plugins"),
        (changed(format="another"), "is no report of lora_plugins"),
        (changed(version=99), "is of version 99 .* reads 1"),
        (changed(costs={}), "is damaged: TypeError"),
        (changed(more=1), "is damaged: TypeError"),
        (changed(classes=None), "is damaged: TypeError"),
        (changed(metrics=["mean_iou"]), "is damaged: AttributeError"),
        (changed(metrics={}), "is damaged: KeyError: 'mean_iou'"),
    ],
    ids=[
        *("missing", "no JSON", "a list", "another format", "a later version", "no costs", "a field too many", "null"),
        *("metrics without names", "no main metric"),
    ],
)
def test_what_is_no_report(tmp_path, text, message):
    if text is not None:
        (tmp_path / "report.json").write_text(text)
    with pytest.raises(ReportError, match=message):
        read_run(tmp_path)
