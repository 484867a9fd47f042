"""The table of speed: cells that are kept in a file, measured once, and drawn; no time is asserted."""

import json
import sys

import pytest
import torch
from torch import nn

pytest.importorskip("timm")
pytest.importorskip("transformers")

from benchmarks.speed import cases, cells, draw, precision
from benchmarks.speed.__main__ import main
from benchmarks.speed.memory import allocator_peak, process_peak

MIB = 2**20


class Tiny(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))

    def set_grad_checkpointing(self, enable: bool) -> None:
        assert enable


@pytest.fixture
def tiny(monkeypatch) -> None:
    case = cases.Case("Tiny", Tiny, lambda: (torch.randn(4, 8),), 2, (nn.Linear,))
    monkeypatch.setitem(cells.CASES, "vit", case)


def measure(path, *options: str) -> dict:
    common = ["--case", "vit", "--rounds", "2", "--threads", str(torch.get_num_threads()), "--device", "cpu"]
    assert main([*common, "--json", str(path), *options]) == 0
    return json.loads(path.read_text())


@pytest.mark.slow
def test_every_eager_cell_of_a_model(tiny, tmp_path, capsys):
    variants = ["--variant", "full", "ours", "ours, low memory", "ours, DoRA"]
    found = measure(tmp_path / "cpu.json", "--mode", "eager", *variants)
    assert len(found["cells"]) == len(precision.PRECISIONS) * 2 * 2
    for cell in found["cells"].values():
        assert [*cell] == ["floor", "full", "ours", "ours, low memory", "ours, DoRA"]
        assert cell["floor"]["ratio"] == 1
        for each in cell.values():
            assert 0 < each["low"] <= each["ratio"] <= each["high"]
            assert each["kept"] >= 0
            assert each["allocator"] > 0
    printed = capsys.readouterr().out
    assert draw.main([str(tmp_path / "cpu.json")]) == 0
    assert capsys.readouterr().out == printed
    assert found["machine"]["processor"] in printed
    assert "| cpu, vit, fp16 autocast, eager, dropout 0.1, checkpointing | " in printed


def test_what_is_in_the_file_is_not_measured_again(tiny, tmp_path):
    one = ["--precision", "float32", "--mode", "eager", "--dropout", "0", "--checkpointing", "no", "--variant", "ours"]
    first = measure(tmp_path / "cpu.json", *one)
    assert measure(tmp_path / "cpu.json", *one) == first
    assert measure(tmp_path / "cpu.json", "--again", *one) != first
    more = measure(tmp_path / "cpu.json", *one, "full")
    assert [*next(iter(more["cells"].values()))] == ["floor", "ours", "full"]


def test_results_of_another_machine_are_refused(tiny, tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"machine": {"processor": "another"}, "cells": {}}))
    with pytest.raises(SystemExit, match=r"measured on .*another.*use another file"):
        measure(path)


def test_a_variant_that_its_library_refuses_says_so():
    results = {
        "machine": {"processor": "p", "card": "", "threads": 1, "torch": "2", "peft": ""},
        "cells": {"cpu": {"floor": {"ratio": 1.0, "low": 1.0, "high": 1.0, "ms": 2.0}, "peft": {"ratio": None}}},
    }
    assert "| cpu | refuses | 2.0 |" in draw.as_text(results)


def test_peaks_count_what_a_step_has_at_once():
    def step() -> None:
        for _ in range(3):
            torch.ones(2 * MIB)  # 8 MiB

    assert 8 * MIB <= allocator_peak(step, torch.device("cpu")) < 12 * MIB
    peak = process_peak(step)
    assert (peak is None) == (not sys.platform.startswith("linux"))
