"""Two epochs and two more are four, bit for bit: weights, moments, scheduler, dropout, shuffling, statistics."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from lora_plugins.plugins import default_registry
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, load, loader, trainer, values

CASES = {
    "plain": (CONFIG, {}),
    "tracked_norm": (replace(CONFIG, norm="track"), {}),
    "adapter_dropout": (replace(CONFIG, dropout=0.3), {}),
    "head": (replace(CONFIG, target_modules=["net.0"], modules_to_save=["net.3"]), {}),
    "biases": (replace(CONFIG, bias="all"), {}),
    "loftq": (replace(CONFIG, init="loftq"), {}),
    "nf4": (replace(CONFIG, quantize="nf4", quantize_options={"min_size": 0}), {}),
    "nf4_loftq": (replace(CONFIG, quantize="nf4", quantize_options={"min_size": 0}, init="loftq"), {}),
    "nf4_bf16_true": (
        replace(CONFIG, quantize="nf4", quantize_options={"min_size": 0}),
        {"precision": "bf16-true"},
    ),
    "accumulation": (CONFIG, {"accumulate_grad_batches": 3}),
    "bf16_true": (CONFIG, {"precision": "bf16-true"}),
    "bf16_mixed": (CONFIG, {"precision": "bf16-mixed"}),
}


class Stop(Exception):  # noqa: N818
    pass


class StopAt(Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            raise Stop


def run(folder, config, epochs, *more, first=True, **options):
    lora = LoraCallback(config, merge_on_fit_end=False)
    callbacks = [lora, *more] if first else [*more, lora]
    return trainer(folder, callbacks, max_epochs=epochs, **options)


def same(first, second):
    """The keys under which two checkpoints differ in weights, optimizer, scheduler or random numbers."""
    a, b = load(first), load(second)
    flat = [
        {
            **checkpoint["state_dict"],
            **{
                f"optimizer/{index}/{key}": torch.as_tensor(value)
                for index, state in checkpoint["optimizer_states"][0]["state"].items()
                for key, value in state.items()
            },
            **{
                f"schedule/{k}": torch.tensor(v) for k, v in checkpoint["lr_schedulers"][0].items() if k != "lr_lambdas"
            },
            "random": next(state["random"] for state in checkpoint["callbacks"].values() if "random" in state),
        }
        for checkpoint in (a, b)
    ]
    return differing(*flat)


def fit_straight(folder, module, *data, config=CONFIG, **options):
    """Fits without a break, and leaves a file of each epoch, and that of the end."""
    torch.manual_seed(5)
    straight = run(folder, config, 4, ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1), **options)
    straight.fit(module, *data)
    straight.save_checkpoint(folder / "straight.ckpt")


def differing_if_resumed(folder, module, *data, config=CONFIG, file="epoch=1.ckpt", **options):
    """What differs from the straight run if another one goes on from a file."""
    torch.manual_seed(99)  # what the resumed process happens to draw does not matter
    resumed = run(folder, config, 4, **options)
    resumed.fit(module, *data, ckpt_path=folder / file)
    resumed.save_checkpoint(folder / "resumed.ckpt")
    return same(folder / "straight.ckpt", folder / "resumed.ckpt")


@pytest.mark.filterwarnings("ignore:.*trainable tensors did not move")  # small steps in bfloat16
@pytest.mark.parametrize(("config", "options"), CASES.values(), ids=CASES.keys())
def test_resumed_run_is_the_straight_run(config, options, tmp_path):
    torch.manual_seed(5)
    straight = run(tmp_path, config, 4, **options)
    straight.fit(Classifier(dropout=0.2), loader(shuffle=True))
    straight.save_checkpoint(tmp_path / "straight.ckpt")

    torch.manual_seed(5)
    saver = ModelCheckpoint(tmp_path, filename="half")
    run(tmp_path, config, 2, saver, **options).fit(Classifier(dropout=0.2), loader(shuffle=True))
    again = Classifier(dropout=0.2), loader(shuffle=True)
    assert not differing_if_resumed(tmp_path, *again, config=config, file="half.ckpt", first=False, **options)


RARE_VALIDATION = {
    "each second epoch": {"check_val_every_n_epoch": 2},
    "by steps": {"check_val_every_n_epoch": None, "val_check_interval": 8},
}


@pytest.mark.parametrize("options", RARE_VALIDATION.values(), ids=RARE_VALIDATION)
def test_resume_from_a_file_of_a_validation_that_not_each_epoch_has(options, tmp_path):
    """Lightning runs the rest of the epoch of the file first, which is empty, and then draws batches once more."""
    fit_straight(tmp_path, Classifier(dropout=0.2), loader(shuffle=True), loader(), **options)
    again = Classifier(dropout=0.2), loader(shuffle=True), loader()
    assert not differing_if_resumed(tmp_path, *again, **options)


class CountsSteps(Classifier):
    """Sets up the data before `on_fit_start`, and its iterators draw random numbers."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, steps)]


@pytest.mark.parametrize("first", [True, False], ids=["lora_first", "lora_last"])
def test_resume_where_the_optimizer_asks_for_the_number_of_steps(tmp_path, first):
    fit_straight(tmp_path, CountsSteps(dropout=0.2), loader(shuffle=True))
    assert not differing_if_resumed(tmp_path, CountsSteps(dropout=0.2), loader(shuffle=True), first=first)


class DrawsNoise(Classifier):
    """Draws the noise that its pictures are made of, at the start of each run."""

    def __init__(self, hook):
        super().__init__(dropout=0.2)
        setattr(self, hook, lambda: torch.randn(3))


class CountsStepsAndDraws(CountsSteps, DrawsNoise):
    pass


@pytest.mark.parametrize("first", [True, False], ids=["lora_first", "lora_last"])
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
@pytest.mark.parametrize("cls", [DrawsNoise, CountsStepsAndDraws])
def test_resume_where_a_hook_of_the_start_draws(tmp_path, cls, hook, first):
    fit_straight(tmp_path, cls(hook), loader(shuffle=True))
    assert not differing_if_resumed(tmp_path, cls(hook), loader(shuffle=True), first=first)


class Averages(Classifier):
    """Averages what is trained in buffers, as `LitEma` of ldm does; made when the adapters are there."""

    def make(self):
        self.ema = nn.Module()
        for name, p in self.net.named_parameters():
            if p.requires_grad:
                self.ema.register_buffer(name.replace(".", ""), p.detach().clone())

    def on_fit_start(self):
        if not hasattr(self, "ema"):
            self.make()

    def on_load_checkpoint(self, checkpoint):
        if any(name.startswith("ema.") for name in checkpoint["state_dict"]):
            self.make()

    def on_train_batch_end(self, *_):
        for name, p in self.net.named_parameters():
            if p.requires_grad:
                self.ema.get_buffer(name.replace(".", "")).lerp_(p.detach(), 0.1)


def test_resume_with_an_average_in_buffers_that_is_made_before_the_file_is_loaded(tmp_path):
    straight, half, again = Averages(), Averages(), Averages()
    run(tmp_path, CONFIG, 4).fit(straight, loader())
    first = run(tmp_path, CONFIG, 2)
    first.fit(half, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    run(tmp_path, CONFIG, 4).fit(again, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert not differing(values(again), values(straight))
    assert not differing(values(load_from_checkpoint(Averages, tmp_path / "half.ckpt")), values(half))


@pytest.mark.slow
def test_resume_after_a_crash_in_a_new_process(tmp_path):
    torch.manual_seed(5)
    straight = run(tmp_path, CONFIG, 4)
    straight.fit(Classifier(dropout=0.2), loader(shuffle=True))
    straight.save_checkpoint(tmp_path / "straight.ckpt")

    torch.manual_seed(5)
    crashed = run(tmp_path, CONFIG, 4, ModelCheckpoint(tmp_path, filename="half", save_top_k=-1), StopAt(2))
    with pytest.raises(Stop):
        crashed.fit(Classifier(dropout=0.2), loader(shuffle=True))
    path = next(path for path in tmp_path.glob("half*.ckpt") if load(path)["epoch"] == 1)
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tests.integrations.lightning.checkpoint.test_resume import CONFIG, Classifier, loader, run\n"
        "again = run(sys.argv[1], CONFIG, 4)\n"
        "again.fit(Classifier(dropout=0.2), loader(shuffle=True), ckpt_path=sys.argv[2])\n"
        "again.save_checkpoint(sys.argv[1] + '/resumed.ckpt')\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path), str(path)], check=True, timeout=120)
    assert not same(tmp_path / "straight.ckpt", tmp_path / "resumed.ckpt")


def test_exception_checkpoint_is_small_and_resumes(tmp_path):
    crashed = run(tmp_path, CONFIG, 4, OnExceptionCheckpoint(tmp_path, "crash"), StopAt(2))
    with pytest.raises(Stop):
        crashed.fit(Classifier(), loader())
    assert not set(load(tmp_path / "crash.ckpt")["state_dict"]) & set(Classifier().state_dict())
    run(tmp_path, CONFIG, 4).fit(Classifier(), loader(), ckpt_path=tmp_path / "crash.ckpt")


class HasNoData(Classifier):
    """Stops before it is adapted."""

    def prepare_data(self):
        raise Stop


def test_exception_checkpoint_of_a_run_that_was_never_adapted_is_to_be_removed(tmp_path):
    keeps = OnExceptionCheckpoint(tmp_path, "crash")
    with pytest.raises(Stop):
        run(tmp_path, CONFIG, 1, keeps).fit(HasNoData(), loader())
    with pytest.raises(AdapterFileError, match=r"crash.ckpt holds no adapter.* to every fit .*: remove it"):
        run(tmp_path, CONFIG, 1, keeps).fit(Classifier(), loader())
    (tmp_path / "crash.ckpt").unlink()
    run(tmp_path, CONFIG, 1, keeps).fit(Classifier(), loader())


class Interrupt(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            raise KeyboardInterrupt


def test_ctrl_c_and_fit_again(tmp_path):
    module = Classifier()
    with pytest.raises(SystemExit):
        run(tmp_path, CONFIG, 2, Interrupt()).fit(module, loader())
    keys = set(module.state_dict())
    assert "setup" not in vars(module)
    assert "configure_optimizers" not in vars(module)
    run(tmp_path, CONFIG, 2).fit(module, loader())
    assert set(module.state_dict()) == keys
    assert len(LoraModel(module).adapters) == 1


class TestSecondFit:
    def test_new_trainer_goes_on_with_the_adapter_that_is_there(self, tmp_path):
        module = Classifier()
        run(tmp_path, CONFIG, 1).fit(module, loader())
        first = values(module)
        run(tmp_path, CONFIG, 1).fit(module, loader())
        assert first.keys() == values(module).keys()
        assert differing(first, values(module)) == {key for key in first if "lora" in key}

    def test_other_configuration_under_the_same_name_is_refused(self, tmp_path):
        module = Classifier()
        run(tmp_path, CONFIG, 1).fit(module, loader())
        before = values(module)
        with pytest.raises(StateError, match=r"another configuration.*'r'"):
            run(tmp_path, replace(CONFIG, r=4), 1).fit(module, loader())
        assert not differing(before, values(module))

    def test_validate_and_predict_first(self, tmp_path):
        module = Classifier()
        ours = run(tmp_path, CONFIG, 1)
        ours.validate(module, loader(), verbose=False)
        ours.predict(module, loader())
        ours.fit(module, loader())
        ours.test(module, loader(), verbose=False)
        ours.fit_loop.max_epochs = 2
        ours.fit(module, loader())

    def test_callback_is_used_for_the_next_fold(self, tmp_path):
        lora = LoraCallback(CONFIG)
        folds = [Classifier(base_seed=seed) for seed in (0, 0)]
        for module in folds:
            torch.manual_seed(3)
            trainer(tmp_path, [lora]).fit(module, loader())
        assert not differing(values(folds[0]), values(folds[1]))
        assert differing(values(folds[0]), values(Classifier()))


class TestInjection:
    def test_is_an_identity(self, tmp_path):
        module = Classifier()
        expected = trainer(tmp_path, []).validate(module, loader(), verbose=False)
        watcher = FirstValidation()
        trainer(tmp_path, [LoraCallback(CONFIG), watcher], num_sanity_val_steps=-1).fit(module, loader(), loader())
        assert watcher.loss == expected[0]["val/loss"]

    def test_does_not_shift_the_users_random_numbers(self, tmp_path):
        orders = []
        for callbacks in ([], [LoraCallback(CONFIG)]):
            torch.manual_seed(11)
            order = Order()
            trainer(tmp_path, [*callbacks, order]).fit(Classifier(), loader(shuffle=True))
            orders.append(torch.cat(order.seen))
        assert torch.equal(*orders)


class FirstValidation(Callback):
    loss = None

    def on_validation_end(self, trainer, pl_module):
        if self.loss is None:
            self.loss = float(trainer.callback_metrics["val/loss"])


class Order(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(batch[0])


FURTHER_TYPE = """
from torch import nn

from lora_plugins import RowMajorPlugin, hookimpl


class PairsPlugin(RowMajorPlugin):
    name = "pairs"
    module_type = nn.Bilinear


@hookimpl
def lora_plugins_register_layers(registrar):
    registrar.add(PairsPlugin())
"""


class Squared(nn.Bilinear):
    def forward(self, x):
        return super().forward(x, x)


class WithPairs(Classifier):
    """Has a layer of a type that is adapted where there is a plugin for it."""

    def __init__(self, **options):
        super().__init__(**options)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net.append(Squared(3, 3, 3))


@pytest.fixture
def further_type(tmp_path, monkeypatch):
    """Returns what installs a plugin for a further layer type."""

    def install():
        path = tmp_path / "further.py"
        path.write_text(FURTHER_TYPE)
        monkeypatch.setenv("LORA_PLUGINS_LOAD", str(path))
        default_registry.cache_clear()

    yield install
    default_registry.cache_clear()


def test_resume_where_a_plugin_for_a_further_layer_type_has_come_since(tmp_path, further_type):
    config = LoraConfig(r=2, target_modules="all")
    fit_straight(tmp_path, WithPairs(dropout=0.2), loader(shuffle=True), config=config)
    further_type()
    assert not differing_if_resumed(tmp_path, WithPairs(dropout=0.2), loader(shuffle=True), config=config)
    anew = WithPairs()
    run(tmp_path, config, 1).fit(anew, loader())
    assert "net.5" in {layer.name for layer in LoraModel(anew).plans["default"].layers}


def test_a_plugin_that_has_come_since_and_changes_no_layer_leaves_the_parameters_where_they_are(tmp_path, further_type):
    first = run(tmp_path, CONFIG, 1)
    first.fit(Classifier(), loader())
    first.save_checkpoint(path := tmp_path / "first.ckpt")
    further_type()
    LoraModel(module := Classifier(), CONFIG)
    before = {name: id(parameter) for name, parameter in module.named_parameters()}
    run(tmp_path, CONFIG, 2).fit(module, loader(), ckpt_path=path)
    assert {name: id(parameter) for name, parameter in module.named_parameters()} == before


@pytest.mark.parametrize(
    ("precision", "turned"),
    [("bf16-true", False), ("32-true", True)],
    ids=["one is made anew of the base", "given in another order"],
)
def test_each_of_two_adapters_goes_on_with_its_own_state_of_the_optimizer(tmp_path, precision, turned):
    def fit(epochs, turned=False, **options):
        configs = {init: LoraConfig(r=2, target_modules=["net.0"], init=init) for init in ("pissa", "kaiming")}
        callbacks = [LoraCallback(c, adapter_name=name, merge_on_fit_end=False) for name, c in configs.items()]
        module = Classifier()
        run = trainer(tmp_path, callbacks[::-1] if turned else callbacks, max_epochs=epochs, precision=precision)
        run.fit(module, loader(), **options)
        return run, module

    run, _ = fit(1)
    run.save_checkpoint(tmp_path / "it.ckpt")
    _, straight = fit(2)
    _, resumed = fit(2, turned, ckpt_path=tmp_path / "it.ckpt")
    assert not differing(values(straight), values(resumed))
