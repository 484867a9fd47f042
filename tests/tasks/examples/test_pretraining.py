"""Pretraining makes the same file again, and the shipped weights are what it makes."""

import pytest
from safetensors.torch import load_file

from lora_plugins.tasks.examples import RECIPES, architecture, pretrain


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_pretraining_is_reproducible(tmp_path):
    one, two = (pretrain("digits_classifier", tmp_path / name, epochs=1) for name in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_shipped_files_are_of_the_architecture_in_the_yaml(request):
    """Every tensor, head included, has the shape that pretraining would write."""
    from lora_plugins.tasks.models import source_of

    for name, recipe in RECIPES.items():
        model = architecture(recipe.configuration, num_classes=len(recipe.data().class_names), weights="none")
        built = source_of(model, recipe.task.sources).build(model).module.state_dict()
        shipped = load_file(request.config.rootpath / "tasks" / "weights" / f"{name}.safetensors")
        assert {key: tensor.shape for key, tensor in shipped.items()} == {k: t.shape for k, t in built.items()}


def test_shipped_weights_know_what_they_were_trained_for(trainer):
    """The shipped backbones, on what they were trained for: far above chance, which is one in four."""
    from lora_plugins.tasks.examples import DIGITS, RECIPES, architecture

    for name, recipe in RECIPES.items():
        data = recipe.data()
        classes = len(data.class_names)
        model = architecture(recipe.configuration, num_classes=classes, weights=f"package:{name}")
        task = recipe.task(model)
        assert task.head_modules == ()
        (result,) = trainer().validate(task, datamodule=data, verbose=False)
        assert len(DIGITS) == 4
        assert result[f"val/{task.main_metric}"] > 0.9
