"""Every call that changes a model, stopped at its lines: the model is what it was before, or what it is after.

The call is then made again, or the model is unloaded.
"""

import copy
import gc
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lora_plugins import LoraConfig, LoraError, LoraModel, calibrate, load_quantized
from lora_plugins.adapter import InitData
from lora_plugins.inplace import frozen_statistics
from lora_plugins.kernels import disabled_kernels, kernel_report
from lora_plugins.utils import own_randomness, seeded, without_collection
from tests.state.checks import loss_of
from tests.state.interrupted import differences, every_line, passed, picture, process, stopped
from tests.state.plugins import registry
from tests.state.spec import Spec
from tests.state.zoo import batch, build, sites

MODELS = {
    "heads": (("linear", "head"), Spec(("head.body", "linear.proj"), saves=("head.head",), init="gaussian")),
    "parts": (("fused", "attention"), Spec(("fused.qkv", "attention.mha"), parts={"fused.qkv": ("q",)}, bias="all")),
    "ties": (("tied", "twice"), Spec(("tied.a", "tied.b", "twice.first"), init="gaussian")),
    "norms": (("norms", "conv2d"), Spec(("norms.inner", "conv2d.conv"), norm="track", bias="lora_only")),
    "computed": (("computed", "groups"), Spec(("computed.proj", "groups.conv"), init="gaussian", memory="low")),
    "changed": (("linear", "conv1d"), Spec(("linear.proj", "conv1d.conv"), init="pissa", saves=())),
    "stored": (
        ("linear", "attention", "tied"),
        Spec(("linear.proj", "attention.mha", "tied.a", "tied.b"), init="gaussian", quantize="nf4"),
    ),
    "plugin": (("bilinear", "read"), Spec(("bilinear.form", "read.proj"), variant="dora", init="gaussian")),
}
"""Blocks of the zoo and what an adapter does to them, by name."""

POINTS = 3
"""Lines at which each call is stopped in the fast suite, spread over all of them; the slow test takes every line."""


def spec_of(name):
    blocks, spec = MODELS[name]
    known = sites(build(blocks))
    return blocks, replace(spec, sites=tuple(site for site in known if site in spec.sites))


class Scene:
    """A model with adapters, made the same again and again."""

    def __init__(self, name, folder):
        self.blocks, self.spec = spec_of(name)
        self.inputs = batch(torch.float64, 0)
        self.folder = folder

    def base(self):
        return build(self.blocks, torch.float64, 0).eval()

    def adapted(self, *names):
        model = self.base()
        for number, name in enumerate(names):
            LoraModel(model, replace(self.spec, r=2 + number).config(), name, registry=registry())
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            with torch.no_grad():
                parameter.add_(0.02 * (1 + number % 3))
        return model

    def unloaded(self):
        """The base, whose float values are gone where it is stored."""
        if self.spec.quantize is None:
            return self.base()
        return lora(self.adapted("a")).unload(dequantize=False)

    def merged(self):
        model = self.adapted("a", "b")
        LoraModel(model).merge_adapter(max_error=10)
        return model

    def saved(self):
        if not (self.folder / "adapter").exists():
            LoraModel(self.adapted("a"), registry=registry()).save_adapter(self.folder / "adapter")
        return self.folder / "adapter"


def lora(model):
    return LoraModel(model, registry=registry())


def within(block):
    with block:
        pass


def learned(scene, model):
    """A call that runs the model, in training mode, on data."""
    data = InitData([scene.inputs], step=lambda model, inputs: loss_of(model(*inputs)))
    config = LoraConfig(r=1, target_modules=[scene.spec.sites[-1]], init="lora_ga")
    LoraModel(model, config, "c", registry=registry(), init_data=data)


CALLS = {
    "add": (lambda s: s.base(), lambda s, m: LoraModel(m, s.spec.config(), "a", registry=registry())),
    "add-another": (
        lambda s: s.adapted("a"),
        lambda s, m: lora(m).add_adapter("b", replace(s.spec, init="none").config()),
    ),
    "learn": (lambda s: s.adapted("a"), learned),
    "set": (lambda s: s.adapted("a", "b"), lambda s, m: lora(m).set_adapter("b")),
    "freeze": (lambda s: s.adapted("a"), lambda s, m: lora(m).set_adapter("a", trainable=False)),
    "delete": (lambda s: s.adapted("a", "b"), lambda s, m: lora(m).delete_adapter("a")),
    "delete-last": (lambda s: s.adapted("a"), lambda s, m: lora(m).delete_adapter("a")),
    "merge": (lambda s: s.adapted("a", "b"), lambda s, m: lora(m).merge_adapter(max_error=10)),
    "unmerge": (lambda s: s.merged(), lambda s, m: lora(m).unmerge_adapter()),
    "unload": (lambda s: s.adapted("a", "b"), lambda s, m: lora(m).unload(dequantize=False)),
    "unload-merged": (lambda s: s.merged(), lambda s, m: lora(m).unload(dequantize=False)),
    "unload-dense": (lambda s: s.adapted("a"), lambda s, m: lora(m).unload(dequantize=True)),
    "combine": (
        lambda s: s.adapted("a", "b"),
        lambda s, m: lora(m).add_weighted_adapter(["a", "b"], [0.5, 2.0], "c", "svd"),
    ),
    "load": (
        lambda s: s.base(),
        lambda s, m: LoraModel.load_adapter(m, s.saved(), registry=registry()),
    ),
    "swap": (lambda s: s.adapted("b", "a"), lambda s, m: lora(m).swap_adapter("a", s.saved())),
    "save": (lambda s: s.adapted("a", "b"), lambda s, m: lora(m).save_adapter(s.folder / "again", "a")),
    "disable": (lambda s: s.adapted("a", "b"), lambda s, m: within(lora(m).disable_adapter())),
    "mixed": (lambda s: s.adapted("a"), lambda s, m: within(lora(m).mixed_batch([None] * 3))),
}
"""What a model is before, and the call; by name."""

REFUSED = {("changed", "combine"), ("plugin", "combine"), ("changed", "swap"), ("stored", "learn")}
"""Calls that are refused, by model: what has changed the base, or is a variant, is not combined, or not swapped; an
init that changes the base does not start from a stored one."""

each = pytest.mark.parametrize(
    ("name", "call"), [(name, call) for name in MODELS for call in CALLS if (name, call) not in REFUSED]
)


def outcome(call, scene, model):
    """What a call leaves, or the class of the error that refuses it."""
    try:
        call(scene, model)
    except LoraError as refused:
        return type(refused).__name__
    return picture(model, scene.inputs)


def check(scene, prepare, call, points):
    scene.saved()
    prepared = prepare(scene)
    before = picture(prepared, scene.inputs)
    model = copy.deepcopy(prepared)
    lines = passed(lambda: call(scene, model))
    after = picture(model, scene.inputs)
    again = outcome(call, scene, model)
    base = picture(scene.unloaded(), scene.inputs)
    for at in points(lines):
        model = copy.deepcopy(prepared)
        where, raised = stopped(lambda model=model: call(scene, model), at)
        found = picture(model, scene.inputs)
        is_before, is_after = raised and not differences(found, before), not differences(found, after)
        assert is_before or is_after, f"{where}: {differences(found, before)} of before, {differences(found, after)}"
        if at % 2:
            assert outcome(call, scene, model) == (after if is_before else again), where
        elif found["adapters"]:
            lora(model).unload(dequantize=False)
            assert not differences(picture(model, scene.inputs), base), where


@each
def test_a_call_is_whole(name, call, tmp_path):
    def spread(lines):
        step = max(1, len(lines) // POINTS)
        return range(len(name + call) % step, len(lines), step)

    check(Scene(name, tmp_path), *CALLS[call], spread)


@pytest.mark.slow
@pytest.mark.timeout(3600)
# A file that is written is closed by Python, and not by its `with`, if the stop is where the block is left.
@pytest.mark.filterwarnings("ignore:Exception ignored in. <_io:pytest.PytestUnraisableExceptionWarning")
@each
def test_a_call_is_whole_at_every_line(name, call, tmp_path):
    check(Scene(name, tmp_path), *CALLS[call], every_line)
    gc.collect()  # such a file, while its warning is let through


class Counting(nn.Module):
    """Has a buffer in the place of another after each forward."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen = self.seen + 1
        return self.proj(x)


def test_a_forward_that_replaces_a_buffer_is_undone():
    data = InitData([torch.randn(2, 3)], step=lambda model, x: model(x).square().mean())

    def adapt(model):
        LoraModel(model, LoraConfig(r=1, init="lora_ga"), init_data=data)

    lines = len(passed(lambda: adapt(Counting())))
    for at in range(0, lines, lines // 40):
        model = Counting()
        seen = model.seen
        where, _ = stopped(lambda model=model: adapt(model), at)
        assert model.seen is seen, where
        assert seen == 0, where


class Noted(nn.Module):
    """Counts its calls in a buffer, in place; in training mode, with a part that is not."""

    def __init__(self):
        super().__init__()
        self.proj, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.norm(self.proj(x))


def test_a_model_that_is_calibrated_is_what_it_was():
    data = InitData([torch.randn(2, 3)], step=lambda model, x: model(x).square().mean())
    plan = LoraModel.plan(Noted(), LoraConfig(r=1, target_modules=["proj"], init="lora_ga"))
    prepared = Noted()
    prepared.norm.weight.requires_grad_(False)

    def look(model):
        tensors = {name: (id(tensor), tensor.data_ptr()) for name, tensor in named_tensors(model)}
        parts = [(part.training, len(part._forward_pre_hooks)) for part in model.modules()]
        return tensors, parts, [p.requires_grad for p in model.parameters()], float(model.calls), process()

    def named_tensors(model):
        return [*model.named_parameters(), *model.named_buffers()]

    lines = passed(lambda: calibrate(copy.deepcopy(prepared), plan, data))
    for at in every_line(lines):
        model = copy.deepcopy(prepared)
        before = look(model)
        where, _ = stopped(lambda model=model: calibrate(model, plan, data), at)
        assert look(model) == before, where


def check_merge_for_good(scene, points):
    prepared = scene.adapted("a", "b")
    before = picture(prepared, scene.inputs)
    model = copy.deepcopy(prepared)
    options = {"max_error": 10, "dequantize": scene.spec.quantize is not None}
    lines = passed(lambda: lora(model).merge_and_unload(**options))
    after = picture(model, scene.inputs)
    for at in points(lines):
        model = copy.deepcopy(prepared)
        where, _ = stopped(lambda model=model: lora(model).merge_and_unload(**options), at)
        with torch.no_grad():
            outputs = model(*scene.inputs)
        for block, output in outputs.items():
            expected = torch.frombuffer(bytearray(before["outputs"][block]), dtype=output.dtype).view(output.shape)
            torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-12, msg=f"{where}: {block}")
        if picture(model, scene.inputs)["adapters"] is not None:
            lora(model).merge_and_unload(**options)
        assert not differences(picture(model, scene.inputs), after), where


@pytest.mark.parametrize("name", MODELS)
def test_merging_for_good_goes_on_where_it_was_stopped(name, tmp_path):
    check_merge_for_good(Scene(name, tmp_path), lambda lines: range(0, len(lines), max(1, len(lines) // (2 * POINTS))))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_merging_for_good_goes_on_from_every_line(name, tmp_path):
    check_merge_for_good(Scene(name, tmp_path), every_line)


@pytest.mark.parametrize("step", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_base_is_loaded_as_a_whole(step, tmp_path):
    def build():
        return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    def load(model):
        load_quantized(model, tmp_path / "base.safetensors", config)

    def empty():
        with torch.device("meta"):
            return build()

    config = LoraConfig(target_modules="all", quantize="nf4", quantize_options={"min_size": 0})
    save_file(build().state_dict(), tmp_path / "base.safetensors")
    load(empty())  # the first call finds the plugins, too
    lines = passed(lambda: load(empty()))
    points = [at for at, line in enumerate(lines) if line.startswith(("inplace/storing.py", "files/base_files.py"))]
    assert any(lines[at].startswith("inplace/storing.py") for at in points)
    for at in points[::step]:
        model = empty()
        where, _ = stopped(lambda model=model: load(model), at)
        assert len({tensor.is_meta for tensor in model.state_dict().values()}) == 1, where


ENDINGS = {
    "own-randomness": lambda layer: own_randomness(3, layer),
    "seeded": lambda _: seeded(torch.Generator().manual_seed(3)),
    "without-collection": lambda _: without_collection(),
    "frozen-statistics": frozen_statistics,
    "disabled-kernels": lambda _: disabled_kernels("all"),
}


@pytest.mark.parametrize("block", ENDINGS.values(), ids=ENDINGS)
def test_what_a_block_changes_is_put_back_wherever_it_is_stopped(block):
    def run(layer):
        with block(layer):
            pass

    kernels = kernel_report()
    for at in range(len(passed(lambda: run(nn.Linear(2, 2))))):
        layer = nn.Linear(2, 2)
        before = process()
        where, raised = stopped(lambda layer=layer: run(layer), at)
        assert raised, where
        assert not differences({"process": process()}, {"process": before}), where
        assert layer.training, where
        assert kernel_report() == kernels, where
