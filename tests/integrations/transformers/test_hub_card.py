"""The card that a Trainer writes, without a hub."""

import pytest

from lora_plugins import LoraModel
from lora_plugins.integrations.transformers import LoraTrainer
from tests.integrations.transformers.toys import VIT, arguments, images, trainer, vit


def test_without_a_hub_it_names_what_there_is(tmp_path):
    run = trainer(tmp_path / "flowers", eval_strategy="epoch")
    run.train()
    run.model.config._name_or_path = "owner/base"
    run.create_model_card(license="mit")
    card = (tmp_path / "flowers" / "README.md").read_text()
    assert all(text in card for text in ("license: mit", "base_model: owner/base", "# flowers", "| loss |"))
    assert LoraModel.load_adapter(vit(), tmp_path / "flowers").active_adapters == ("default",)


def test_before_a_push_it_names_the_repository_of_the_arguments(tmp_path):
    trainer(tmp_path, hub_model_id="owner/flowers").create_model_card()
    assert 'LoraModel.load_adapter(model, "hf://owner/flowers")' in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
def test_it_has_the_numbers_of_the_model_that_is_there(tmp_path, best):
    """On all sets; what compute_metrics returns can hold more than numbers, as that of mean IoU does."""
    seen = []

    def score(prediction):  # the first epoch is the best one
        seen.append(len(seen))
        return {"score": -float(len(seen)), "per_category": [0.5, 0.25]}

    fields = {"load_best_model_at_end": True, "metric_for_best_model": "one_score"} if best else {}
    args = arguments(tmp_path, eval_strategy="epoch", **fields)
    sets = {"train_dataset": images(), "eval_dataset": {"one": images(3), "two": images(3)}}
    run = LoraTrainer(vit(), args, **sets, lora_config=VIT, compute_metrics=score)
    run.train()
    first = 1 if best else 3
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert f"| one_score | -{first} |" in card
    assert f"| two_score | -{first + 1} |" in card
    assert "per_category" not in card
    run.evaluate(images(3))
    run.create_model_card()
    assert "| score | -5 |" in (tmp_path / "README.md").read_text()


def test_a_path_of_this_machine_is_no_name_of_a_base(tmp_path):
    run = trainer(tmp_path)
    run.model.config._name_or_path = str(tmp_path)
    run.create_model_card()
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()


def test_a_merged_model_has_that_of_the_trainer(tmp_path):
    run = trainer(tmp_path, merge_on_train_end=True)
    run.train()
    run.create_model_card()
    assert "Training procedure" in (tmp_path / "README.md").read_text()
