"""With other callbacks and in other modes of Lightning: nothing lost, nothing silent."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric

from lora_plugins import LoraConfig, LoraModel, StateError, TargetError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, load, loader, trainer, values

BASE = set(Classifier().state_dict())


def lora(config=CONFIG, **options):
    return LoraCallback(config, **{"merge_on_fit_end": False, **options})


class TestTuners:
    class Watch(Callback):
        """Notes the weights when the tuner is done and training has not begun."""

        def on_train_start(self, trainer, pl_module):
            self.start = values(pl_module)

    # The tuner's own short runs come before any hook of ours.
    pytestmark = pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode:UserWarning")

    @pytest.mark.parametrize("norm", ["freeze", "track"])
    def test_learning_rate_finder_leaves_adapter_and_statistics_as_they_were(self, tmp_path, norm):
        finder = LearningRateFinder(num_training_steps=8, max_lr=0.5)
        self.check(tmp_path, finder, norm)

    @pytest.mark.parametrize("norm", ["freeze", "track"])
    def test_batch_size_finder_leaves_adapter_and_statistics_as_they_were(self, tmp_path, norm):
        finder = BatchSizeFinder(mode="power", steps_per_trial=2, init_val=4, max_trials=2, batch_arg_name="batch_size")
        self.check(tmp_path, finder, norm)

    def check(self, tmp_path, finder, norm):
        torch.manual_seed(4)
        module, watch = Sized(), self.Watch()
        run = trainer(tmp_path, [lora(replace(CONFIG, norm=norm)), finder, watch], max_epochs=1)
        run.fit(module)
        torch.manual_seed(4)
        untouched = Sized()
        LoraModel(untouched, replace(CONFIG, norm=norm))
        assert not differing(watch.start, values(untouched))
        assert LoraModel(module).active_adapters == ("default",)


class Sized(Classifier):
    batch_size = 8

    def train_dataloader(self):
        return torch.utils.data.DataLoader(loader().dataset, batch_size=self.batch_size)

    val_dataloader = train_dataloader


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


def test_early_stopping_merges(tmp_path):
    module = Classifier(lr=5.0)
    run = trainer(
        tmp_path,
        [lora(merge_on_fit_end=True), EarlyStopping("val/loss", patience=1)],
        max_epochs=20,
    )
    run.fit(module, loader(), loader())
    assert run.current_epoch < 20
    assert values(module).keys() == BASE


class WithBackbone(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_base_unfrozen_by_another_callback_is_refused_by_name(tmp_path):
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    with pytest.raises(StateError, match=r"made trainable.*(backbone|net\.0)\.weight"):
        trainer(tmp_path, [lora(), finetuning], max_epochs=3).fit(WithBackbone(), loader())


class Writes(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[1].weight.add_(1.0)


def test_base_that_moved_is_said_at_the_end(tmp_path):
    with pytest.raises(StateError, match=r"frozen tensors changed.*net\.1\.weight"):
        trainer(tmp_path, [lora(), Writes()]).fit(Classifier(), loader())


class Swaps(Precision):
    """Replaces linear layers when the strategy is set up, as the plugins of bitsandbytes and TransformerEngine do."""

    def convert_module(self, module):
        new = nn.Linear(4, 16)
        module.net[0] = new
        return module


def test_precision_plugin_that_replaces_layers_is_refused(tmp_path):
    with pytest.raises(StateError, match=r"replaced by others.*net\.0.*precision plugin"):
        trainer(tmp_path, [lora()], plugins=[Swaps()]).fit(Classifier(), loader())


class Distance(Metric):
    """A metric with a network of its own, as FID has."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4))

    def update(self, x):
        pass

    def compute(self):
        return 0.0


def test_networks_of_metrics_are_not_adapted(tmp_path):
    module = Classifier()
    module.metric = Distance()
    trainer(tmp_path, [lora(LoraConfig(r=2))]).fit(module, loader())
    assert type(module.metric.net[0]) is nn.Linear
    assert LoraModel(module).plans["default"].layers[0].name == "net.0"


class ArrivesInEvalMode(Classifier):
    def __init__(self):
        super().__init__(dropout=0.5)
        self.net.eval()
        self.modes = []

    def training_step(self, batch, batch_idx):
        self.modes.append((self.net[4].training, self.net[1].training))
        return super().training_step(batch, batch_idx)


def test_models_that_arrive_in_eval_mode_are_put_into_training_mode_without_a_warning(tmp_path):
    module = ArrivesInEvalMode()
    trainer(tmp_path, [lora(), LoraCallback(OTHER, adapter_name="other", merge_on_fit_end=False)]).fit(module, loader())
    assert set(module.modes) == {(True, False)}


def test_models_that_are_to_stay_in_eval_mode_stay_and_lightning_warns(tmp_path):
    module = ArrivesInEvalMode()
    with pytest.warns(UserWarning, match="6 module.s. in eval mode"):
        trainer(tmp_path, [lora(train_mode=False)]).fit(module, loader())
    assert set(module.modes) == {(False, False)}


OTHER = LoraConfig(r=1, target_modules=["net.3"])


class Deep(Classifier):
    """Gradient checkpointing as it should be: without reentry."""

    checkpointing = False

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=False) if self.checkpointing else self.net(x)


class Gradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        self.found = {name: p.grad.clone() for name, p in pl_module.named_parameters() if p.grad is not None}


def test_gradients_with_checkpointing_are_those_without(tmp_path):
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        module, watch = Deep(), Gradients()
        module.checkpointing = checkpointing
        trainer(tmp_path, [lora(), watch]).fit(module, loader())
        found.append(watch.found)
    assert not differing(*found)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions_train_merge_and_load(tmp_path, precision):
    module = Classifier(lr=0.3)
    saver = ModelCheckpoint(tmp_path, filename="it")
    run = trainer(tmp_path, [lora(merge_on_fit_end=True), saver], precision=precision)
    run.fit(module, loader())
    assert values(module).keys() == BASE
    run.test(module, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)


@pytest.mark.parametrize("start", [2.0**10, 2.0**40], ids=["fits", "overflows"])
def test_float16_with_a_scaled_loss(tmp_path, start):
    """Steps that are skipped after an overflow are no sign of tensors that do not move."""
    scaler = torch.amp.GradScaler("cpu", init_scale=start, backoff_factor=2.0**-10)
    saver = ModelCheckpoint(tmp_path, filename="it")
    module = Classifier(lr=0.3)
    run = trainer(tmp_path, [lora(), saver], plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=4)
    run.fit(module, loader())
    assert (scaler.get_scale() < start) == (start > 2.0**20)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    again = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
    assert not differing(values(again), values(module))


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


class TestRefusedAtOnce:
    def test_no_match_lists_what_there_is(self, tmp_path):
        module = Classifier()
        before = values(module)
        with pytest.raises(TargetError, match=r"'net\.O' matches no module.*'net\.3'"):
            trainer(tmp_path, [lora(LoraConfig(target_modules=["net.O"]))]).fit(module, loader())
        assert not differing(before, values(module))
        assert type(module.net[0]) is nn.Linear

    def test_nested_targets(self, tmp_path):
        callbacks = [lora(LoraConfig(r=2), target="net"), lora(LoraConfig(r=2), adapter_name="other")]
        with pytest.raises(StateError, match="lie inside one another"):
            trainer(tmp_path, callbacks).fit(Classifier(), loader())

    def test_unknown_target(self, tmp_path):
        with pytest.raises(ValueError, match=r"target is 'nett'.*'net'"):
            trainer(tmp_path, [lora(target="nett")]).fit(Classifier(), loader())


def test_trainer_of_the_other_namespace(tmp_path):
    other = pytest.importorskip("pytorch_lightning")
    body = {name: value for name, value in vars(Classifier).items() if callable(value) and name != "__init__"}
    module = type("Other", (other.LightningModule,), body)()
    module.net = Classifier().net
    run = other.Trainer(
        callbacks=[lora()],
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(StateError, match=r"from lightning\.pytorch"):
        run.fit(module, loader())
