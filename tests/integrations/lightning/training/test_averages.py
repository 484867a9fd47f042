"""With callbacks that average weights."""

import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)

from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.toys import BASE, Classifier, differing, load, loader, lora, trainer, values

AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.parametrize("first", [True, False], ids=["lora_first", "lora_last"])
@pytest.mark.parametrize("make", AVERAGING.values(), ids=AVERAGING.keys())
class TestAveraging:
    def callbacks(self, make, first, *more, **options):
        both = [lora(**options), make()]
        return [*(both if first else reversed(both)), *more]

    def test_average_is_trained_saved_small_and_kept(self, tmp_path, make, first):
        module = Classifier()
        before = values(module)
        saver = ModelCheckpoint(tmp_path, filename="it")
        trainer(tmp_path, self.callbacks(make, first, saver), max_epochs=4).fit(module, loader(), loader())
        assert {key for key in differing(before, values(module)) if key in before} == set()
        assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if ".lora_B." in name)
        checkpoint = load(tmp_path / "it.ckpt")
        assert not BASE & set(checkpoint["state_dict"])
        assert not BASE & set(checkpoint.get("current_model_state", ()))
        for state in checkpoint["callbacks"].values():
            assert not BASE & set(state.get("average_model_state") or ())

    def test_resumed_is_straight(self, tmp_path, make, first):
        torch.manual_seed(2)
        straight = Classifier()
        trainer(tmp_path, self.callbacks(make, first), max_epochs=4).fit(straight, loader(), loader())
        torch.manual_seed(2)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        trainer(tmp_path, self.callbacks(make, first, saver), max_epochs=4).fit(Classifier(), loader(), loader())
        resumed = Classifier()
        run = trainer(tmp_path, self.callbacks(make, first), max_epochs=4)
        run.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt")
        assert not differing(values(straight), values(resumed))

    def test_file_holds_the_average_and_the_merge_takes_it(self, tmp_path, make, first):
        module = Classifier()
        run = trainer(tmp_path, self.callbacks(make, first, merge_on_fit_end=True), max_epochs=4)
        run.fit(module, loader(), loader())
        assert values(module).keys() == BASE
        assert differing(values(module), values(Classifier())) == {"net.0.weight", "net.3.weight"}


def test_ema_checkpoint_gives_the_metric_that_was_logged(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
    run = trainer(tmp_path, [EMAWeightAveraging(decay=0.5), lora(), saver], max_epochs=3)
    module = Classifier()
    run.fit(module, loader(), loader())
    for path, logged in saver.best_k_models.items():
        found = run.test(module, loader(), ckpt_path=path, verbose=False)[0]["val/loss"]
        assert found == pytest.approx(float(logged), rel=1e-6)
        alone = trainer(tmp_path, []).test(load_from_checkpoint(Classifier, path), loader(), verbose=False)
        assert alone[0]["val/loss"] == pytest.approx(float(logged), rel=1e-6)
