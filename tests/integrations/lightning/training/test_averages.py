"""With callbacks that average weights."""

import copy

import pytest
import torch
from lightning.pytorch.callbacks import (
    Callback,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from packaging.version import Version
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from lora_plugins import LoraConfig, LoraModel, StateError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import (
    BASE,
    Classifier,
    HidesItsBackbone,
    Renames,
    differing,
    load,
    loader,
    lora,
    trainer,
    values,
)

PLAIN = Version(torch.__version__) >= Version("2.10")
"""Whether files can be read without unpickling: before it, the scheduler of SWA brings a function."""

AVERAGING = {
    "ema": lambda: EMAWeightAveraging(decay=0.5),
    "rounding": lambda: EMAWeightAveraging(decay=0.8),  # the average of equal values differs from them by a bit
    "swa": lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}
OFTEN = ("ema-lora_first", "ema-lora_last", "rounding-lora_first", "swa-lora_last")

averaged = pytest.mark.parametrize(
    ("make", "first"),
    [
        pytest.param(make, first, id=name, marks=() if name in OFTEN else pytest.mark.slow)
        for kind, make in AVERAGING.items()
        for first, name in ((True, f"{kind}-lora_first"), (False, f"{kind}-lora_last"))
    ],
)


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@averaged
class TestAveraging:
    def callbacks(self, make, first, *more, **options):
        both = [lora(**options), make()]
        return [*(both if first else reversed(both)), *more]

    def test_average_is_trained_saved_small_and_kept(self, tmp_path, make, first):
        module = Classifier()
        before = values(module)
        saver = ModelCheckpoint(tmp_path, filename="it")
        trainer(tmp_path, self.callbacks(make, first, saver), max_epochs=4).fit(module, loader(), loader())
        assert not differing(before, values(module)) & before.keys()
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


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
class TestStatisticsOfNorms:
    """SWA sets those of all norms to 0 and 1, and passes over the data once more to have them anew."""

    TRACKED = LoraConfig(r=2, target_modules=["net.0", "net.3"], norm="track")

    def pretrained(self, tracked):
        module = Classifier()
        module.net[1].load_state_dict(
            {
                **module.net[1].state_dict(),
                "running_mean": torch.linspace(-1, 1, 16),
                "running_var": torch.linspace(1, 2, 16),
                "num_batches_tracked": torch.tensor(tracked),  # 0 in files of older versions of torch
            }
        )
        return module

    @pytest.mark.parametrize("merge", [False, True], ids=["adapted", "merged"])
    @pytest.mark.parametrize("tracked", [0, 100])
    @averaged
    def test_frozen(self, tmp_path, make, first, tracked, merge):
        module = self.pretrained(tracked)
        before = values(module)
        both = [lora(merge_on_fit_end=merge), make()]
        trainer(tmp_path, both if first else both[::-1], max_epochs=3).fit(module, loader(), loader())
        assert {key for key in differing(before, values(module)) if key.startswith("net.1.")} == set()

    def test_resumed_with_the_pass(self, tmp_path):
        def run(*more):
            return trainer(tmp_path, [lora(), AVERAGING["swa"](), *more], max_epochs=3)

        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run(saver).fit(straight := self.pretrained(7), loader(), loader())
        run().fit(resumed := self.pretrained(7), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
        assert not differing(values(straight), values(resumed))

    def test_of_an_adapter_that_tracks_them(self, tmp_path):
        module = self.pretrained(7)
        callback = lora(self.TRACKED, save_adapter_to=str(tmp_path / "a"))
        trainer(tmp_path, [callback, AVERAGING["swa"]()], max_epochs=3).fit(module, loader(), loader())
        with torch.no_grad():
            seen = torch.cat([module.net[0](x) for x, _ in loader()])  # all batches have one size
        torch.testing.assert_close(module.net[1].running_mean, seen.mean(0))
        again = self.pretrained(7)
        LoraModel.load_adapter(again, tmp_path / "a")
        assert not differing(values(module), values(again))
        assert not differing(values(LoraModel(module).unload()), values(self.pretrained(7)))


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
def test_resumed_before_the_epoch_in_which_swa_renews_statistics(tmp_path):
    """There is a step and no backward in it."""

    def run(*more):
        swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
        return trainer(tmp_path, [lora(), swa, *more], max_epochs=3)

    run(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)).fit(straight := Classifier(), loader(), loader())
    run().fit(resumed := Classifier(), loader(), loader(), ckpt_path=tmp_path / "epoch=2.ckpt")
    assert not differing(values(straight), values(resumed))


class Centered(Classifier):
    """Moves a frozen parameter by hand after a warm-up."""

    def __init__(self):
        super().__init__()
        self.net.center = nn.Parameter(torch.zeros(3), requires_grad=False)
        self.validated = []

    def on_validation_batch_start(self, *_):
        self.validated.append(self.net.center[0].item())

    def forward(self, x):
        return self.net[:5](x)

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            self.net.center.add_(self.global_step > 4)


@pytest.mark.parametrize(
    ("first", "every"), [(True, 0.5), (False, 1.0)], ids=["lora_first-twice_an_epoch", "lora_last-once_an_epoch"]
)
def test_what_the_module_moves_by_hand_is_averaged_as_without_adapters(tmp_path, first, every):
    def fitted(*callbacks):
        run = trainer(tmp_path, [*callbacks], val_check_interval=every)
        run.fit(module := Centered(), loader(64), loader())
        return module

    both = [lora(), EMAWeightAveraging(decay=0.5)]
    plain, module = fitted(EMAWeightAveraging(decay=0.5)), fitted(*(both if first else both[::-1]))
    assert torch.equal(module.net.center, plain.net.center)
    assert module.validated == plain.validated
    assert module.net.center[0] % 1


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


class Configured(Classifier):
    """WeightAveraging calls its hook when it is set up itself, ahead of the module's own `setup`."""

    def configure_model(self):
        pass


class Late(Configured):
    def __init__(self):
        super().__init__()
        del self.net

    def setup(self, stage):
        if not hasattr(self, "net"):
            self.net = Classifier().net


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides:UserWarning")
@pytest.mark.parametrize("module_class", [Configured, Late])
@averaged
def test_with_configure_model(tmp_path, module_class, first, make):
    """In the second fit the merge of the first one is taken back, and the average is copied once more."""

    def fitted(module):
        torch.manual_seed(0)
        callback = lora(merge_on_fit_end=True)
        for _ in range(2):
            both = [callback, make()]
            trainer(tmp_path, both if first else both[::-1], max_epochs=3).fit(module, loader(), loader())
        return values(module)

    assert not differing(fitted(module_class()), fitted(Classifier()))


class OwnAverage(Callback):
    """An average as callbacks of other packages keep it (rfdetr's): the module has it when training ends."""

    def __init__(self, part):
        self.part = part

    def on_fit_start(self, trainer, pl_module):
        self.average = AveragedModel(pl_module.get_submodule(self.part), avg_fn=get_ema_avg_fn(0.8), use_buffers=True)

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.average.update_parameters(pl_module.get_submodule(self.part))

    def on_train_end(self, trainer, pl_module):
        pl_module.get_submodule(self.part).load_state_dict(self.average.module.state_dict())


@pytest.mark.parametrize("first", [True, False], ids=["lora_first", "lora_last"])
@pytest.mark.parametrize("part", ["", "net"], ids=["the module", "its network"])
def test_average_of_another_callback_has_the_frozen_base(tmp_path, part, first):
    module = Classifier()
    before = values(module)
    callbacks = [lora(merge_on_fit_end=False), OwnAverage(part)]
    trainer(tmp_path, callbacks if first else callbacks[::-1], max_epochs=4).fit(module, loader(), loader())
    assert not differing(before, values(module)) & before.keys()
    assert any(p.any() for name, p in module.named_parameters() if ".lora_B." in name)


class TwoDecays(EMAWeightAveraging):
    """Keeps a slower average beside that of Lightning."""

    def on_fit_start(self, trainer, pl_module):
        self.slow = AveragedModel(pl_module, avg_fn=get_ema_avg_fn(0.99))

    def on_train_batch_end(self, trainer, pl_module, *args):
        super().on_train_batch_end(trainer, pl_module, *args)
        self.slow.update_parameters(pl_module)


def test_second_average_of_a_callback_has_the_frozen_base(tmp_path):
    module, averaging = Classifier(), TwoDecays(decay=0.8)
    before = values(module)
    trainer(tmp_path, [lora(), averaging], max_epochs=4).fit(module, loader(), loader())
    assert not differing(before, values(averaging.slow.module)) & before.keys()


class EarlyAverage(Callback):
    """Makes its average in `setup`, before there are adapters, and anew in `on_fit_start` if it is told to."""

    def __init__(self, make, part, again=False):
        self.make, self.part, self.again = make, part, again

    def setup(self, trainer, pl_module, stage):
        self.average = self.make(pl_module.get_submodule(self.part))

    def on_fit_start(self, trainer, pl_module):
        if self.again:
            self.setup(trainer, pl_module, "fit")


class OfAModule(nn.Module):
    """As timm's ModelEmaV3."""

    def __init__(self, module):
        super().__init__()
        self.module = copy.deepcopy(module)

    def update(self, module):
        raise NotImplementedError


class OfAnObject:
    """As the ModelEma of rfdetr."""

    def __init__(self, module):
        self.module = copy.deepcopy(module)

    def update(self, module):
        raise NotImplementedError


class EarlyCopy(EarlyAverage):
    """Averages a bare copy by a method of its own, as the SWA of PaSST does."""

    def __init__(self, part, again=False):
        super().__init__(copy.deepcopy, part, again)

    def update_parameters(self, module):
        raise NotImplementedError


class Squares(Classifier):
    """Two square layers without biases: pairs by position have fitting shapes where they do not belong together."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))


@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("first", [True, False], ids=["lora_first", "lora_last"])
@pytest.mark.parametrize("part", ["", "net", "net.0"], ids=["the module", "its network", "a layer"])
@pytest.mark.parametrize("make", [AveragedModel, OfAModule, OfAnObject])
class TestMadeBeforeAdapters:
    CONFIG = LoraConfig(r=4, target_modules=["net.0"])

    def callbacks(self, first, other):
        return [lora(self.CONFIG), other] if first else [other, lora(self.CONFIG)]

    def test_refused_by_name(self, tmp_path, make, part, first, sanity):
        callbacks = self.callbacks(first, EarlyAverage(make, part))
        with pytest.raises(
            StateError, match=rf"EarlyAverage\.average \({make.__name__}\) holds a copy of weights of Sq"
        ):
            trainer(tmp_path, callbacks, num_sanity_val_steps=sanity).fit(Squares(), loader(), loader())

    def test_made_anew_in_on_fit_start(self, tmp_path, make, part, first, sanity):
        callbacks = self.callbacks(first, EarlyAverage(make, part, again=True))
        trainer(tmp_path, callbacks, num_sanity_val_steps=sanity).fit(Squares(), loader(), loader())


@pytest.mark.parametrize("part", ["", "net", "net.0"], ids=["the module", "its network", "a layer"])
class TestCopyThatItsCallbackAverages:
    def test_refused_by_name_if_made_before_adapters(self, tmp_path, part):
        with pytest.raises(StateError, match=r"EarlyCopy\.average \(\w+\) holds a copy of weights of Classifier"):
            trainer(tmp_path, [lora(), EarlyCopy(part)]).fit(Classifier(), loader())

    def test_made_anew_in_on_fit_start(self, tmp_path, part):
        trainer(tmp_path, [lora(), EarlyCopy(part, again=True)]).fit(Classifier(), loader())


class WithATemperature(EarlyAverage):
    """Keeps a teacher, and updates something else."""

    def update(self, step):
        raise NotImplementedError

    def update_temperature(self, step):
        raise NotImplementedError


def test_a_teacher_of_a_callback_that_updates_something_else_is_no_matter(tmp_path):
    trainer(tmp_path, [lora(), WithATemperature(copy.deepcopy, "net")]).fit(Classifier(), loader())


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: AveragedModel(Classifier(base_seed=1).net)])
def test_teachers_and_averages_of_other_networks_are_no_matter(tmp_path, make):
    trainer(tmp_path, [lora(), EarlyAverage(make, "net")]).fit(Classifier(), loader())


def test_average_of_one_of_two_networks_keeps_its_own_base(tmp_path):
    class Twins(Classifier):
        def __init__(self):
            super().__init__()
            self.second = Classifier(base_seed=1).net

        def forward(self, x):
            return self.net(x) + self.second(x)

    module = Twins()
    before = values(module)
    callbacks = [OwnAverage("second"), lora(config=LoraConfig(r=2, target_modules=["0", "3"]))]
    trainer(tmp_path, callbacks, max_epochs=4).fit(module, loader(), loader())
    assert not differing(before, values(module)) & before.keys()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading:UserWarning")  # as a new one
@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_average_of_another_type_than_the_module(tmp_path, precision):
    """The average is copied before the Trainer casts the module."""
    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"], norm="track")
    saver = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
    run = trainer(tmp_path, [lora(config), EMAWeightAveraging(decay=0.5), saver], precision=precision)
    run.fit(Classifier(), loader(), loader())
    for path, logged in saver.best_k_models.items():
        for module in (Classifier(), load_from_checkpoint(Classifier, path)):
            again = trainer(tmp_path, [lora(config)], precision=precision)
            found = again.validate(module, loader(), ckpt_path=path, verbose=False)[0]["val/loss"]
            assert found == pytest.approx(float(logged), rel=1e-6)
    resumed = trainer(tmp_path, [lora(config), EMAWeightAveraging(decay=0.5)], precision=precision, max_epochs=3)
    resumed.fit(Classifier(), loader(), loader(), ckpt_path=path)


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback, but loading:UserWarning")  # as a new one
@averaged
class TestAfterTheMerge:
    """What comes after a fit that merged sees the merged average, and nothing of the callback's own copy."""

    def fitted(self, tmp_path, make, first, width=16, **options):
        callbacks = [lora(**{"merge_on_fit_end": True, **options}), make()]
        saver = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
        run = trainer(tmp_path, [*(callbacks if first else reversed(callbacks)), saver], max_epochs=3)
        module = Classifier(width=width, lr=0.3)
        torch.manual_seed(4)
        run.fit(module, loader(), loader())
        return run, module, saver

    def alone(self, tmp_path, module):
        return trainer(tmp_path, []).validate(module, loader(), verbose=False)

    @pytest.mark.parametrize("width", [16, 4], ids=["oblong", "square"])
    def test_validate(self, tmp_path, make, first, width):
        run, module, _ = self.fitted(tmp_path, make, first, width)
        merged, expected = values(module), self.alone(tmp_path, module)
        for read in (run.validate, run.test, run.validate):
            assert read(module, loader(), verbose=False) == expected
        assert not differing(values(module), merged)

    def test_validate_with_a_checkpoint(self, tmp_path, make, first):
        run, module, saver = self.fitted(tmp_path, make, first)
        for path, logged in saver.best_k_models.items():
            for read in (run.validate, run.test):
                found = read(module, loader(), ckpt_path=path, verbose=False)[0]["val/loss"]
                assert found == pytest.approx(float(logged), rel=1e-6)

    def test_checkpoint_in_a_new_module(self, tmp_path, make, first):
        _, _, saver = self.fitted(tmp_path, make, first)
        for path, logged in saver.best_k_models.items():
            callbacks = [lora(merge_on_fit_end=True), make()]
            run = trainer(tmp_path, [*(callbacks if first else reversed(callbacks))])
            found = run.validate(Classifier(), loader(), ckpt_path=path, verbose=False)[0]["val/loss"]
            assert found == pytest.approx(float(logged), rel=1e-6)

    def test_merged_checkpoint(self, tmp_path, make, first):
        run, module, _ = self.fitted(tmp_path, make, first)
        run.save_checkpoint(path := tmp_path / "merged.ckpt")
        expected, options = self.alone(tmp_path, module), {"ckpt_path": path, "weights_only": PLAIN, "verbose": False}
        assert run.validate(module, loader(), **options) == expected
        for callbacks in ([make()], [lora(), make()][:: 1 if first else -1]):
            new = trainer(tmp_path, callbacks)
            assert new.validate(Classifier(), loader(), **options) == expected

    def test_plain_checkpoint_in_between(self, tmp_path, make, first):
        plain = trainer(tmp_path, [], max_epochs=1)
        plain.fit(Classifier(), loader())
        plain.save_checkpoint(tmp_path / "plain.ckpt")
        expected = plain.validate(plain.lightning_module, loader(), verbose=False)
        callbacks = [lora(merge_on_fit_end=False), make()]
        run = trainer(tmp_path, [*(callbacks if first else reversed(callbacks))], max_epochs=3)
        run.fit(module := Classifier(), loader(), loader())
        assert run.validate(module, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False) == expected

    def test_best_is_validated(self, tmp_path, make, first):
        run, module, saver = self.fitted(tmp_path, make, first, merge_source="best")
        found = run.validate(module, loader(), verbose=False)[0]["val/loss"]
        assert found == pytest.approx(float(saver.best_model_score), rel=1e-5)

    def test_goes_on_from_the_best(self, tmp_path, make, first):
        """What is saved after `fit` has the best weights twice: as those of the module, and as the average."""
        run, module, _ = self.fitted(tmp_path, make, first, merge_source="best", merge_on_fit_end=False)
        run.save_checkpoint(path := tmp_path / "fitted.ckpt")
        checkpoint = torch.load(path, weights_only=False)
        held = [state.get("average_model_state") for state in checkpoint["callbacks"].values()]
        stored = [checkpoint["state_dict"], checkpoint.get("current_model_state"), *held]
        best = values(module)
        for state in filter(None, stored):
            assert not differing(state, {key: best[key] for key in state})
        both = [lora(), make()]
        resumed = trainer(tmp_path, both if first else both[::-1], max_epochs=4)
        resumed.fit(Classifier(lr=0.3), loader(), loader(), ckpt_path=path)
        assert resumed.current_epoch >= 4  # SWA adds one

    def test_second_fit(self, tmp_path, make, first):
        """With the same callback, which takes its merge back, as with a new one that finds the adapter."""
        results = []
        for same in (True, False):
            run, module, _ = self.fitted(tmp_path, make, first)
            own = next(callback for callback in run.callbacks if isinstance(callback, LoraCallback))
            if not same:
                own.undo_merge(module)
                own = lora(merge_on_fit_end=True)
            torch.manual_seed(5)
            callbacks = [own, make()]
            run = trainer(tmp_path, [*(callbacks if first else reversed(callbacks))], max_epochs=3)
            run.fit(module, loader(), loader())
            assert run.validate(module, loader(), verbose=False) == self.alone(tmp_path, module)
            results.append(values(module))
        assert not differing(*results)

    def test_saved_after_fit(self, tmp_path, make, first):
        run, _, _ = self.fitted(tmp_path, make, first)
        run.save_checkpoint(tmp_path / "merged.ckpt")
        checkpoint = torch.load(tmp_path / "merged.ckpt", weights_only=PLAIN)
        assert checkpoint["state_dict"].keys() == BASE
        assert "current_model_state" not in checkpoint
        for state in checkpoint["callbacks"].values():
            assert (state.get("average_model_state") or {}).keys() <= BASE


def test_checkpoint_of_a_module_that_hides_its_backbone(tmp_path):
    """EMAWeightAveraging writes what torch's own state dict of the average has."""
    saver = ModelCheckpoint(tmp_path, filename="it")
    run = trainer(tmp_path, [lora(), EMAWeightAveraging(decay=0.8), saver], max_epochs=2)
    run.fit(module := HidesItsBackbone(lr=0.3), loader(), loader())
    expected = trainer(tmp_path, [lora()]).validate(module, loader(), verbose=False)
    for read in (load_from_checkpoint(HidesItsBackbone, tmp_path / "it.ckpt"), HidesItsBackbone()):
        run = trainer(tmp_path, [lora()])
        assert run.validate(read, loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False) == expected


def test_resumed_where_the_module_renames_keys(tmp_path):
    """Its hook renames those of the average, and not those of the weights before averaging."""

    def run(module, path=None):
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        callbacks = [lora(), EMAWeightAveraging(decay=0.8), saver]
        trainer(tmp_path, callbacks, max_epochs=2).fit(module, loader(), loader(), ckpt_path=path)
        return values(module)

    straight = run(Renames(lr=0.3))
    assert not differing(run(Renames(lr=0.3), tmp_path / "epoch=0.ckpt"), straight)
    loaded = load_from_checkpoint(Renames, tmp_path / "epoch=1.ckpt")
    assert not differing(values(loaded), straight)
