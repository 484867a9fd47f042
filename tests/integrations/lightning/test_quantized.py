"""Fitting on a base that is stored in fewer bytes: checkpoints, merging, export, and what comes after."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import safetensors.torch
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from torch import nn

from lora_plugins import AdapterFileError, LoraModel, StateError
from lora_plugins.adapter import model_state
from lora_plugins.inplace import detached_weight
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import (
    CONFIG,
    Classifier,
    FillsItsBackboneIn,
    differing,
    load,
    loader,
    lora,
    trainer,
    values,
)

NF4 = replace(CONFIG, quantize="nf4", quantize_options={"min_size": 0})
STORED = {f"net.{i}.weight_stored.{name}" for i in (0, 3) for name in ("codes", "scale_codes", "scale_maxima")}


def fitted(folder, config=NF4, module=None, precision="32-true", others=(), **options):
    module = module or Classifier(lr=0.3)
    saver = ModelCheckpoint(folder / "checkpoints", filename="last")
    callback = LoraCallback(config, **{"merge_on_fit_end": False, "print_plan": False, **options})
    run = trainer(folder, [callback, *others, saver], max_epochs=2, precision=precision)
    run.fit(module, loader(), loader())
    return run, module, saver.best_model_path


def loss(run, module, **options):
    return run.test(module, loader(), verbose=False, **options)[0]["val/loss"]


def test_a_checkpoint_leaves_the_stored_base_out(tmp_path):
    run, module, path = fitted(tmp_path)
    assert set(module.state_dict()) >= STORED
    checkpoint = load(path)
    assert not [key for key in checkpoint["state_dict"] if "stored" in key]
    assert set(checkpoint["lora_plugins"]["left_out"]) >= STORED
    expected = loss(run, module)
    other = load_from_checkpoint(Classifier, path)
    assert not differing(values(other), values(module))
    fresh = Classifier(lr=0.3)
    assert loss(trainer(tmp_path, [LoraCallback(NF4)]), fresh, ckpt_path=path) == expected


def test_another_base_is_refused(tmp_path):
    _, _, path = fitted(tmp_path)
    with pytest.raises(AdapterFileError, match=r"another base: 'net.0.weight', 'net.3.weight', stored as nf4"):
        load_from_checkpoint(Classifier, path, base_seed=1)
    run = trainer(tmp_path, [LoraCallback(NF4, merge_on_fit_end=False, print_plan=False)])
    with pytest.raises(AdapterFileError, match=r"trained on another base: 'net.0.weight', 'net.3.weight' differ"):
        run.fit(Classifier(base_seed=1), loader(), ckpt_path=path)
    run = trainer(tmp_path, [LoraCallback(replace(NF4, quantize="int8"), merge_on_fit_end=False, print_plan=False)])
    with pytest.raises(AdapterFileError, match="quantize is 'nf4' in the file and 'int8' here"):
        run.fit(Classifier(), loader(), ckpt_path=path)


@pytest.mark.parametrize("others", [[], [replace(CONFIG, r=3)]], ids=["alone", "beside another adapter"])
def test_a_resumed_run_with_another_seed_takes_the_stored_base_of_the_checkpoint(tmp_path, others):
    """The pretrained weights are lost once others are stored, so that nothing may be stored ahead of the checkpoint."""
    config = replace(NF4, init="pissa", init_options={"niter": 2})
    torch.manual_seed(1)
    others = [LoraCallback(c, adapter_name="b", merge_on_fit_end=False, print_plan=False) for c in others]
    _, module, path = fitted(tmp_path, config, others=others)
    resumed = Classifier(lr=0.3)
    torch.manual_seed(2)
    callback = LoraCallback(config, merge_on_fit_end=False, print_plan=False)
    run = trainer(tmp_path, [callback, *copy.deepcopy(others)], max_epochs=2)
    run.fit(resumed, loader(), loader(), ckpt_path=path)
    assert not differing(values(resumed), values(module))


@pytest.mark.parametrize("options", [{"merge_on_fit_end": True}, {"export_to": "merged.safetensors"}], ids=str)
def test_merging_without_a_word_on_dense_weights_is_refused_before_training(options, tmp_path):
    module = Classifier()
    with pytest.raises(StateError, match=r"'net.0', 'net.3' are stored in fewer bytes.*dequantize=True"):
        fitted(tmp_path, module=module, **options)
    assert module.trainer.global_step == 0
    assert not differing(values(module), values(Classifier()))


def test_merging_and_exporting_dense_weights(tmp_path):
    path = tmp_path / "merged.safetensors"
    run, module, checkpoint = fitted(tmp_path, merge_on_fit_end=True, export_to=str(path), dequantize=True)
    fresh = Classifier()
    assert values(module).keys() == values(fresh).keys()
    assert [type(m) for m in module.modules()] == [type(m) for m in fresh.modules()]
    fresh.load_state_dict(safetensors.torch.load_file(path))
    assert not differing(values(fresh), values(module))
    assert loss(run, module) == pytest.approx(loss(run, module, ckpt_path=checkpoint), rel=1e-5)


def bases(module):
    """The types of the base weights that a library may have quantized, and their dense values."""
    layers = [module.net[at] for at in (0, 3)]
    return [type(each._parameters["weight"]) for each in layers], [detached_weight(each, "weight") for each in layers]


class AtStart(Callback):
    """Keeps what a module has when training starts."""

    def on_train_start(self, trainer, pl_module):
        self.state = {key: value.clone() for key, value in pl_module.state_dict().items()}
        self.kinds, self.dense = bases(pl_module)


def test_a_second_fit_undoes_the_merge_bit_for_bit(tmp_path):
    run, module, path = fitted(tmp_path, merge_on_fit_end=True, dequantize=True)
    once = load(path)["state_dict"]
    run.callbacks.append(seen := AtStart())
    run.fit_loop.max_epochs = run.current_epoch + 1
    run.fit(module, loader())
    assert seen.state.keys() >= STORED
    assert not differing({key: seen.state[key] for key in once}, once)
    stored = {key: value for key, value in seen.state.items() if key in STORED}
    assert not differing(stored, {key: fitted(tmp_path / "b")[1].state_dict()[key] for key in STORED})
    assert isinstance(module.net[0], nn.Linear)
    assert not set(module.state_dict()) & STORED


def test_an_adapter_folder_of_a_run(tmp_path):
    _, module, _ = fitted(tmp_path, save_adapter_to=str(tmp_path / "adapter"))
    other = Classifier()
    LoraModel.load_adapter(other, tmp_path / "adapter")
    assert not differing(values(other), values(module))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_train_validate_train(tmp_path, precision):
    """What validation does without gradients leaves what training needs."""
    run, module, _ = fitted(tmp_path, precision=precision)
    before = values(module)
    run.validate(module, loader(), verbose=False)
    assert not differing(values(module), before)
    run.fit_loop.max_epochs = 3
    run.fit(module, loader(), loader())
    assert {key.split(".")[2] for key in differing(values(module), before) if "lora" in key} == {"lora_A", "lora_B"}
    assert not differing({k: v for k, v in values(module).items() if k in STORED}, before) & STORED
    assert torch.isfinite(torch.tensor(loss(run, module)))


@pytest.mark.filterwarnings("ignore:Swapping scheduler:UserWarning")  # SWA's own
@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch:UserWarning")
@pytest.mark.parametrize(
    "average",
    [lambda: EMAWeightAveraging(decay=0.9), lambda: StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    ids=["ema", "swa"],
)
def test_averages_leave_the_codes_as_they_are(average, tmp_path):
    """An average of equal integers, cut off, is one less."""
    module = Classifier(lr=0.3)
    callbacks = [LoraCallback(NF4, merge_on_fit_end=False, print_plan=False), average()]
    run = trainer(tmp_path, callbacks, max_epochs=3)
    run.fit(module, loader(), loader())
    expected = Classifier()
    LoraModel(expected, NF4)
    stored = {key: value for key, value in expected.state_dict().items() if key in STORED}
    assert not differing({key: module.state_dict()[key] for key in STORED}, stored)


def by_bitsandbytes(make):
    def quantize(module):
        modules = pytest.importorskip("bitsandbytes.nn.modules")
        for at in (0, 3):
            layer = module.net[at]
            new = make(modules)(layer.in_features, layer.out_features)
            new.load_state_dict(layer.state_dict())
            module.net[at] = new.to("cpu")

    return quantize


def by_torchao(config):
    def quantize(module):
        quantization = pytest.importorskip("torchao.quantization")
        quantization.quantize_(module.net, getattr(quantization, config)())

    return quantize


LIBRARIES = {
    "bitsandbytes 4": by_bitsandbytes(lambda modules: partial(modules.Linear4bit, compute_dtype=torch.float32)),
    "bitsandbytes 8": by_bitsandbytes(lambda modules: partial(modules.Linear8bitLt, has_fp16_weights=False)),
    "torchao int8": by_torchao("Int8WeightOnlyConfig"),
    "torchao intx": by_torchao("IntxWeightOnlyConfig"),
    "torchao float8": by_torchao("Float8WeightOnlyConfig"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of these libraries
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("quantize", LIBRARIES.values(), ids=LIBRARIES)
def test_what_other_libraries_quantized(quantize, tmp_path):
    """Merging is refused before training or gives dense weights; another fit goes on with the quantized ones."""
    quantize(module := Classifier(lr=0.3))
    with pytest.raises(StateError, match=r"'net.0', 'net.3' are stored in fewer bytes.*dequantize=True"):
        fitted(tmp_path, CONFIG, module, merge_on_fit_end=True)
    assert model_state(module) is None
    path = tmp_path / "merged.safetensors"
    run, _, _ = fitted(tmp_path, CONFIG, module, dequantize=True, export_to=str(path))
    expected, merged = loss(run, module), Classifier()
    merged.load_state_dict(safetensors.torch.load_file(path))
    assert loss(run, merged) == pytest.approx(expected, rel=1e-5)

    quantize(other := Classifier(lr=0.3))
    kinds, dense = bases(other)
    run, _, _ = fitted(tmp_path, CONFIG, other, dequantize=True, merge_on_fit_end=True)
    assert [type(layer) for layer in other.net] == [type(layer) for layer in Classifier().net]
    assert loss(run, other) == pytest.approx(expected, rel=1e-5)
    run.fit_loop.max_epochs = run.current_epoch + 1
    run.callbacks.append(seen := AtStart())
    run.fit(other, loader())
    assert seen.kinds == kinds
    assert all(map(torch.equal, seen.dense, dense))
    assert type(other.net[0]) is nn.Linear


class Averaging(Classifier):
    """Has an average of its network, of all that is trained: codes have no mean."""

    def __init__(self, quantize):
        super().__init__(lr=0.3)
        quantize(self)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def save_hyperparameters(self, *_):
        """What quantizes is none."""

    @torch.no_grad()
    def on_train_batch_end(self, *_):
        for own, mean in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            if own.requires_grad:
                mean.lerp_(own, 0.5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of these libraries
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("quantize", LIBRARIES.values(), ids=LIBRARIES)
def test_a_copy_of_what_other_libraries_quantized_is_found(quantize, tmp_path):
    """By what is in memory: some of their tensors know neither a largest value nor whether two are equal."""
    module, config = Averaging(quantize), replace(CONFIG, target_modules=["net.0", "net.3", "teacher.0", "teacher.3"])
    before = bases(module)[1]
    fitted(tmp_path, config, module)
    assert all(layer.lora_B["default"].any() for layer in (module.teacher[0], module.teacher[3]))
    assert all(map(torch.equal, bases(module)[1], before))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torchao
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["torchao int8", "torchao float8"])
def test_what_a_module_fills_into_its_file_was_not_moved(kind, tmp_path):
    """Warnings are errors here; values of these types have no arithmetic."""
    for module in (first := FillsItsBackboneIn(), again := FillsItsBackboneIn()):
        LIBRARIES[kind](module)
    kept = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, [lora(), kept], max_epochs=1).fit(first, loader())
    callback = lora(save_adapter_to=tmp_path / "ours")
    trainer(tmp_path, [callback], max_epochs=2).fit(again, loader(), ckpt_path=tmp_path / "last.ckpt")
    assert (tmp_path / "ours").exists()
