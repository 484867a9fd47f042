"""The benchmark on real pictures: its order of runs, and its table."""

import sys

import pytest

from benchmarks.tasks.__main__ import (
    FACTORS,
    FULL,
    METHODS,
    PICTURES,
    RECOMMENDED,
    differences,
    main,
    planned,
    table,
    tried,
)
from benchmarks.tasks.halves import write_halves
from benchmarks.tasks.runs import CASES, Outcome
from lora_plugins.tasks.autoconfig.found import LABELS
from lora_plugins.tasks.autoconfig.recommended import AUTO, RECIPES


def test_after_each_seed_there_is_a_whole_table():
    runs = [(case, name, seed) for case, name, seed, _ in planned(["classification", "segmentation"])]
    assert len(runs) == len(set(runs)) == 3 * 2 * len(METHODS)
    assert [seed for _, _, seed in runs] == sorted(seed for _, _, seed in runs)


def test_as_many_settings_are_tried_for_each_method():
    settings = [(name, *method.tuning.values()) for _, name, method in tried(["segmentation"])]
    assert len(set(settings)) == len(METHODS) * len(FACTORS)
    assert {[name for name, _ in settings].count(name) for name in METHODS} == {len(FACTORS)}


def test_rates_are_tried_on_pictures_alone(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tasks", "data", "--rates", "--case", "digits"])
    with pytest.raises(SystemExit):
        main()
    assert "--rates halves the pictures of DATA, which 'digits' is not made of" in capsys.readouterr().err


def test_each_method_is_tuned_for_each_task():
    assert all(method.tuning.keys() >= {*PICTURES} for method in METHODS.values())
    assert METHODS[FULL].tuning.keys() == CASES.keys()


def test_what_is_recommended_is_compared_with_full_fine_tuning():
    (recommended,) = RECOMMENDED.values()
    assert recommended.tuning.keys() <= METHODS[FULL].tuning.keys()
    assert recommended.tuning["digits"].lr == RECIPES[AUTO][LABELS].lr


def test_the_table_has_means_over_seeds():
    outcomes = [Outcome(seed, metric, 10, 1000, 2.0, 50.0, 2**20) for seed, metric in enumerate((0.4, 0.5, 0.6))]
    *_, line = table({("classification", "LoRA, r=8"): outcomes})
    assert line == "| classification | LoRA, r=8 | 50.0 ± 10.0 | 1.0% | 2.0 | 50 | 1.00 |"


def test_differences_are_paired_by_seed():
    def outcomes(metrics):
        return [Outcome(seed, metric, 10, 1000, 2.0, 50.0, 2**20) for seed, metric in metrics.items()]

    found = {
        ("segmentation", "LoRA, r=8"): outcomes({0: 0.3, 1: 0.5, 2: 0.7, 3: 0.1}),
        ("segmentation", FULL): outcomes({2: 0.6, 0: 0.2, 1: 0.4}),
    }
    assert list(differences(found))[2:] == [
        "| segmentation | LoRA, r=8 |  | +10.0 ± 0.0 |",
        "| segmentation | full fine-tuning |  |  |",
    ]


def test_each_half_of_the_train_split_is_validated_by_the_other(tmp_path):
    for name in ("cifar-mini/train/cat", "camvid-mini/images/train", "camvid-mini/masks/train"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(4):
            (tmp_path / "data" / name / f"{index}.jpg").write_text(str(index))
    for half in write_halves(tmp_path / "data", tmp_path / "halves"):
        for folder in ("cifar-mini/{}/cat", "camvid-mini/images/{}", "camvid-mini/masks/{}"):
            parts = [{path.read_text() for path in (half / folder.format(part)).iterdir()} for part in ("train", "val")]
            assert sorted(map(sorted, parts)) == [["0", "2"], ["1", "3"]]
