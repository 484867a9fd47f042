"""The embedded digits."""

import pytest
import torch

from lora_plugins import ConfigError
from lora_plugins.tasks import (
    DigitsDataModule,
)
from lora_plugins.tasks.examples import load_digit_splits

from ..conftest import loaded


class TestDigits:
    def test_every_digit_is_in_exactly_one_split(self):
        splits = load_digit_splits(range(10))
        numbers = torch.cat([split.numbers for split in splits.values()])
        assert sorted(numbers.tolist()) == list(range(1797))

    def test_the_split_of_a_digit_does_not_depend_on_which_digits_are_asked_for(self):
        few, all_of_them = load_digit_splits([7]), load_digit_splits(range(10))
        assert set(few["test"].numbers.tolist()) < set(all_of_them["test"].numbers.tolist())

    @pytest.mark.parametrize("digits", [range(10), [8, 3]], ids=["all", "some in another order"])
    def test_ink_and_labels_are_those_of_scikit_learn(self, digits):
        from sklearn.datasets import load_digits

        truth = load_digits()
        for split in load_digit_splits(digits).values():
            assert torch.equal(split.ink * 16, torch.from_numpy(truth.images).float()[split.numbers])
            assert torch.equal(torch.tensor(digits)[split.labels], torch.from_numpy(truth.target)[split.numbers])

    @pytest.mark.parametrize("digits", [[], [1, 1], [10]], ids=["none", "twice", "no digit"])
    def test_wrong_digits(self, digits):
        with pytest.raises(ConfigError, match="0 to 9, each once"):
            loaded(DigitsDataModule(digits))

    def test_samples(self):
        data = loaded(DigitsDataModule([4, 5], image_size=12))
        sample = data.splits["train"][0]
        assert sample["image"].shape == (3, 12, 12)
        assert 0 <= sample["image"].min() < 0.1
        assert 0.9 < sample["image"].max() <= 1
        assert sample["name"].startswith("digit number ")
        assert data.class_names == ["4", "5"]

    def test_polarity_and_turn(self):
        plain = loaded(DigitsDataModule([4]))
        turned = loaded(DigitsDataModule([4], dark_on_light=True, quarter_turns=1))
        light, dark = plain.splits["val"][0]["image"], turned.splits["val"][0]["image"]
        torch.testing.assert_close(torch.rot90(1 - light, 1, (1, 2)), dark, atol=1 / 255, rtol=0)
