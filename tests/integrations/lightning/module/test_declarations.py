"""What a module declares about itself."""

from lora_plugins import LoraConfig, LoraModel
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

    def test_below_a_target(self, tmp_path):
        module = self.Declares()
        trainer(tmp_path, [lora(LoraConfig(r=2), target="net")]).fit(module, loader())
        assert LoraModel(module.net).plans["default"].trained == ("3.weight", "3.bias")
