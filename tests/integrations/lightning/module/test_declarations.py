"""What a module declares about itself."""

import pytest

from lora_plugins import ConfigError, LoraConfig, LoraModel, TargetError
from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values


class TestDeclaredHeads:
    class Declares(Classifier):
        head_modules = ("net.3",)

    def test_are_trained_and_saved(self, tmp_path):
        module = self.Declares()
        run = trainer(tmp_path, [lora(LoraConfig(r=2))])
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        assert {"net.3.weight", "net.3.bias"} < set(load(tmp_path / "it.ckpt")["state_dict"])
        assert not differing(values(module), values(load_from_checkpoint(self.Declares, tmp_path / "it.ckpt")))

    def test_one_may_be_named_alone(self):
        class Declares(Classifier):
            head_modules = "net.3"

        assert lora(LoraConfig(r=2)).plan(Declares()).trained == ("net.3.weight", "net.3.bias")

    def test_below_a_target(self, tmp_path):
        module = self.Declares()
        trainer(tmp_path, [lora(LoraConfig(r=2), target="net")]).fit(module, loader())
        assert LoraModel(module.net).plans["default"].trained == ("3.weight", "3.bias")


class TestDeclaredTargets:
    class Suggests(Classifier):
        lora_targets = ("net.0", "net.3")

    class Errs(Classifier):
        lora_targets = ("net.0", "nett.3")

    class SuggestsInside(Classifier):
        lora_targets = r"0|3"

    def adapted(self, cls, target=None, **fields):
        return [layer.name for layer in lora(LoraConfig(r=2, **fields), target=target).plan(cls()).layers]

    def test_stand_for_those_of_a_config_without(self):
        assert self.adapted(self.Suggests) == ["net.0", "net.3"]
        assert self.adapted(self.Suggests, target_modules=["net.3"]) == ["net.3"]

    def test_one_that_is_trained_in_full_is_left_out(self):
        assert self.adapted(self.Suggests, modules_to_save=["net.3"]) == ["net.0"]

    @pytest.mark.parametrize(
        ("cls", "given", "right"),
        [(SuggestsInside, None, "net"), (Suggests, "net", None)],
        ids=["in a part", "in the whole module"],
    )
    def test_elsewhere_say_which_target_they_are_for(self, cls, given, right):
        with pytest.raises(ConfigError, match=rf"{cls.__name__} declares .* Set LoraCallback\(target={right!r}\)"):
            self.adapted(cls, target=given)
        assert self.adapted(cls, target=right)

    def test_one_that_matches_nothing_is_told(self):
        with pytest.raises(TargetError, match=r"'nett.3' matches no module"):
            self.adapted(self.Errs, modules_to_save=["net.3"])
