"""A run that a hook starts inside `fit`: Lightning forgets that it was fitting, and the adapter has to be finished."""

import pytest
import torch
from lightning.pytorch import Callback

from lora_plugins import LoraModel
from lora_plugins.integrations.lightning import LoraCallback
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, loader, trainer, values


class Nested(Callback):
    """Runs another stage when training ends, as luxonis-train does with its test."""

    def __init__(self, stage, hook="on_train_end"):
        setattr(self, hook, lambda run, module, *_: getattr(run, stage)(module, loader()))


class OwnCallback(Classifier):
    """Makes a new callback for each run."""

    def __init__(self, **options):
        super().__init__(lr=0.3)
        self.options = options

    def configure_callbacks(self):
        return [LoraCallback(CONFIG, **self.options)]


def fit(folder, module, callbacks):
    torch.manual_seed(3)
    run = trainer(folder, callbacks, max_epochs=1)
    run.fit(module, loader())
    return run


@pytest.fixture
def expected(tmp_path):
    fit(tmp_path, module := Classifier(lr=0.3), [LoraCallback(CONFIG)])
    return values(module)


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("hook", ["on_train_end", "on_fit_end"])
def test_what_fit_leaves(tmp_path, expected, stage, first, hook):
    lora = LoraCallback(CONFIG, save_adapter_to=tmp_path / "adapter")
    nested = Nested(stage, hook)
    run = fit(tmp_path, module := Classifier(lr=0.3), [nested, lora] if first else [lora, nested])
    assert not differing(values(module), expected)
    assert run.state.fn == "fit"
    loaded = Classifier(lr=0.3)
    LoraModel.load_adapter(loaded, tmp_path / "adapter").merge_and_unload()
    assert not differing(values(loaded), expected)


def test_a_callback_that_the_module_makes_for_each_run(tmp_path, expected):
    fit(tmp_path, module := OwnCallback(save_adapter_to=tmp_path / "adapter"), [Nested("test")])
    assert not differing(values(module), expected)
    assert (tmp_path / "adapter").exists()


def test_the_next_fit_and_test(tmp_path):
    lora = LoraCallback(CONFIG)
    run = fit(tmp_path, module := Classifier(lr=0.3), [lora, Nested("test")])
    tested = run.test(module, loader(), verbose=False)
    assert run.state.fn == "test"
    assert tested == trainer(tmp_path, []).test(module, loader(), verbose=False)


def test_a_fit_that_fails_is_over(tmp_path):
    class Failing(Callback):
        def on_train_end(self, run, module):
            raise ValueError("mine")

    lora, module = LoraCallback(CONFIG), Classifier(lr=0.3)
    run = trainer(tmp_path, [lora, Failing()], max_epochs=1)
    with pytest.raises(ValueError, match="mine"):
        run.fit(module, loader())
    run.test(module, loader(), verbose=False)
    assert run.state.fn == "test"
