"""Numbers as people read them."""

import pytest

from lora_plugins.tasks.pages import kind_of


@pytest.mark.parametrize(
    ("name", "before", "after", "written", "change", "verdict"),
    [
        ("accuracy", 0.125, 0.9534, "95.3%", "+82.8 points", "better"),
        ("accuracy", 0.5, 0.25, "25.0%", "-25.0 points", "worse"),
        ("loss", 1.5, 0.25, "0.250", "-1.25", "better"),
        ("loss", 0.5, 0.00001234, "1e-05", "-0.500", "better"),
        ("calibration_error", 0.1, 0.2, "20.0%", "+10.0 points", "worse"),
        ("mean_iou", None, 0.5, "50.0%", "", ""),
        ("mean_iou", 0.5, None, "-", "", ""),
        ("mean_iou", 0.5, 0.5, "50.0%", "+0.0 points", ""),
        ("my_metric", 1.0, 200.0, "200", "+199", "better"),
        ("loss", 0.5, 0.0, "0", "-0.500", "better"),
    ],
)
def test_a_number_and_its_change(name, before, after, written, change, verdict):
    kind = kind_of(name)
    assert (kind.written(after), kind.change(before, after), kind.verdict(before, after)) == (written, change, verdict)


def test_a_metric_that_is_not_known_has_its_name():
    assert kind_of("my_metric").label == "My metric"
