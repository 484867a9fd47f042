"""The checks of the exactness sweep on a dozen models that are hard to adapt; slow: on every model of it."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from benchmarks.exactness.cases import Case
from benchmarks.exactness.checks import CHECKS, check
from benchmarks.exactness.compare import difference, snapshot
from benchmarks.exactness.ours import OurAdapted, Ours, OursOnNF4
from benchmarks.exactness.suites import SUITES, find_case
from benchmarks.exactness.sweep import sweep
from benchmarks.exactness.timm_cases import MODELS

# The models are other people's, and so are the warnings they give.
pytestmark = pytest.mark.filterwarnings("ignore")

TRICKY = {
    "timm": ("beit", "convnext", "efficientnet", "eva", "nfnet", "resnest", "swin_transformer_v2"),
    "torchvision": ("vit_b_16, smaller", "deeplabv3_mobilenet_v3_large"),
    "transformers": (
        "DetrForObjectDetection",
        "Mask2FormerForUniversalSegmentation",
        "SegformerForSemanticSegmentation",
    ),
    "diffusers": ("AutoencoderOobleck", "ControlNetUnionModel", "HiDreamImageTransformer2DModel"),
}


@pytest.fixture(autouse=True)
def _own_settings() -> Iterator[None]:
    """A case sets the default type of its process, which here is that of all tests."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


class _Computed(nn.Module):
    """Weights that something computes, several in a layer, one tensor in two layers, one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.normed = weight_norm(nn.Conv2d(3, 8, 3, groups=1, padding=1, padding_mode="reflect"))
        self.spectral = spectral_norm(nn.Conv2d(8, 8, 3, groups=4, dilation=2))
        self.embed = nn.Embedding(11, 8)
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embed.weight
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.rnn = nn.GRU(8, 4, bidirectional=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.spectral(self.normed(x).relu()).mean((2, 3))
        y = self.rnn(self.again(self.shared(y).tanh()))[0] + self.embed(torch.tensor([3]))
        return self.tied(y)


COMPUTED = Case("own", "computed, tied and shared weights", _Computed, lambda model: model(torch.randn(2, 3, 9, 9)))


@pytest.mark.parametrize(
    "case",
    [*(find_case(suite, name) for suite, names in TRICKY.items() for name in names), COMPUTED],
    ids=lambda case: f"{case.suite}-{case.name.partition(':')[0]}",
)
def test_a_tricky_model_passes_every_check(case: Case) -> None:
    result = check(case, Ours())
    assert result.failures == {}
    assert result.layers > 0
    assert not result.left_out


@pytest.mark.parametrize(
    "case",
    [find_case("timm", "convnext"), find_case("transformers", "DeformableDetrForObjectDetection"), COMPUTED],
    ids=lambda case: f"{case.suite}-{case.name.partition(':')[0]}",
)
def test_a_base_in_4_bits_passes_every_check(case: Case) -> None:
    result = check(case, OursOnNF4())
    assert result.failures == {}
    assert not result.left_out


@dataclass(frozen=True)
class _Wrong(OurAdapted):
    """Breaks one promise of the library, to see that the checks notice."""

    fault: str = ""

    def merge(self) -> None:
        super().merge()
        if self.fault == "merged":
            next(self.model.parameters()).data.mul_(2)

    def unload(self) -> nn.Module:
        model = super().unload()
        if self.fault == "unloaded":
            next(model.parameters()).data.add_(1e-15)
        if self.fault == "residue":
            model.requires_grad_(False)
        return model

    def save(self, folder: Path) -> None:
        first = self.updates()[0].A
        kept = first.detach().clone()
        if self.fault == "loaded":
            first.data.add_(1e-6)
        super().save(folder)
        first.data.copy_(kept)


class _WrongLibrary(Ours):
    def __init__(self, fault: str) -> None:
        self.fault = fault

    def adapt(self, model: nn.Module) -> _Wrong:
        adapted = super().adapt(model)
        if self.fault == "law":  # another output than W + scaling * B * A gives
            model.register_forward_hook(lambda module, args, output: output * (1 + 1e-8))
        if self.fault == "gradients":
            adapted.updates()[0].A.requires_grad_(False)
        if self.fault == "a NaN":
            adapted.updates()[0].A.register_hook(lambda gradient: gradient * torch.nan)
        return _Wrong(model, adapted.handle, self.fault)

    def load(self, model: nn.Module, folder: Path) -> _Wrong:
        return _Wrong(model, super().load(model, folder).handle, self.fault)


FAULTS = {name: name for name in ("law", "gradients", "merged", "unloaded", "residue", "loaded")} | {
    "a NaN": "gradients"
}
"""The faults, each with the check that notices it."""


@pytest.mark.parametrize(("fault", "noticed"), FAULTS.items(), ids=list(FAULTS))
def test_a_wrong_library_is_noticed(fault: str, noticed: str) -> None:
    case = replace(COMPUTED, build=lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(196, 3)))
    assert noticed in check(case, _WrongLibrary(fault)).failures
    assert noticed in CHECKS


@pytest.mark.parametrize(("value", "is_same"), [(0.0, True), (-0.0, False), (1.0, False)])
def test_a_single_number_is_compared_by_its_bits(value: float, is_same: bool) -> None:
    model = nn.Module()
    model.register_buffer("number", torch.tensor(0.0))
    before = snapshot(model)
    model.number.fill_(value)
    assert (difference(before, snapshot(model)) == "") == is_same


def test_every_module_of_timm_has_a_case() -> None:
    timm = pytest.importorskip("timm")
    assert set(timm.list_modules()) <= MODELS.keys()


def test_a_case_that_hangs_or_does_not_exist_is_reported_by_name() -> None:
    jobs = [("timm", "convnext: test_convnext", "lora_plugins"), ("timm", "no such model", "lora_plugins")]
    results = {result.name: result for result in sweep(jobs, processes=2, timeout=120)}
    assert results["convnext: test_convnext"].passed
    assert "no such model" in results["no such model"].failures["case"]
    (late,) = sweep(jobs[:1], processes=1, timeout=0.0)
    assert "not done" in late.failures["case"]


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("library", [Ours.name, OursOnNF4.name])
@pytest.mark.parametrize("suite", SUITES)
def test_every_model_of_a_suite_passes_every_check(suite: str, library: str) -> None:
    jobs = [(suite, case.name, library) for case in SUITES[suite]()]
    failures = {result.name: result.failures for result in sweep(jobs, processes=2, timeout=900) if result.failures}
    assert failures == {}
