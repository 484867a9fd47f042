"""The Hugging Face hub where it cannot be reached."""

import logging

import pytest
from huggingface_hub import constants

from lora_plugins import ConfigError
from lora_plugins.tasks.hub import cache_where_unreachable, hub_answers
from lora_plugins.tasks.models import CLASSIFIERS, SEGMENTERS, ModelConfig, build_network


@pytest.fixture
def unreachable(monkeypatch):
    """A hub behind a port that nobody listens on."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("sources", "config"),
    [
        (CLASSIFIERS, ModelConfig("timm", "resnet10t", 2, "pretrained")),
        (CLASSIFIERS, ModelConfig("transformers", "nobody/nothing", 2, "pretrained")),
        (SEGMENTERS, ModelConfig("transformers", "nobody/nothing", 2, "pretrained")),
        (SEGMENTERS, ModelConfig("smp", "Unet", 2, "pretrained", options={"encoder_name": "resnet18"})),
    ],
    ids=["timm", "transformers", "a segmenter of transformers", "smp"],
)
def test_a_model_of_it_is_refused_at_once(sources, config, unreachable, caplog):
    with caplog.at_level(logging.INFO), pytest.raises(ConfigError, match=r"[Hh]ub"):
        build_network(config, sources)
    assert "Retrying" not in caplog.text
    assert not constants.HF_HUB_OFFLINE


def test_nothing_is_set_where_the_environment_forbids_it(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub_answers()
    with cache_where_unreachable():
        assert constants.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
