"""The conformance kit for formats of adapter files."""

import tempfile
from collections.abc import Collection, Mapping
from contextlib import chdir
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

from lora_plugins.errors import AdapterFileError
from lora_plugins.model import LoraModel
from lora_plugins.plugins import AdapterFormat
from lora_plugins.testing.check import Check, as_check, by_name, chosen, elsewhere, one_of, run
from lora_plugins.testing.format_case import LAYERS, FormatCase
from lora_plugins.testing.full_disk import no_file_beyond
from lora_plugins.testing.required import (
    TIGHT,
    random_states,
    refuse,
    require,
    require_close,
    require_same_state,
    require_unmoved,
)
from lora_plugins.testing.unpickling import places_of_unpickling
from lora_plugins.utils import own_randomness

ADAPTERS: Mapping[str, Mapping[str, Any]] = {
    "use_rslora": {"use_rslora": True},
    "a variant": {"variant": "dora"},
    "a head": {"modules_to_save": ["last"]},
    "biases": {"bias": "lora_only"},
    "a part of a layer": {"fused_parts": {"to_q": ["q"]}},
    "a changed base": {"init": "pissa"},
}
"""Adapters that have more than an A and a B for each layer, by what that is."""


_NO_ADAPTERS = ("nothing", "empty", "strange.safetensors", "settings.json", "model.safetensors", "model.zip")
"""Files and folders that are no adapters; the first is not there."""


@as_check("registration", "the registrar takes the plugin", "name is missing, or options is no mapping.")
def _registration(case: FormatCase) -> None:
    case.registry()


@as_check(
    "recognized",
    "recognizes knows what write wrote, under the name that it was given, and nothing else; it raises for nothing: "
    "not for what is not there, empty or no such file",
    "recognizes opens a file without looking whether it is there, or goes by the ending of its name or the kind of "
    "file alone, and not by what is in it; or a library writes to that name with an ending, as np.savez does.",
)
def _recognized(case: FormatCase) -> None:
    with case.written() as (lora, path):
        require(case.elsewhere.recognizes(path), f"{path.name} is not recognized")
        _travels(replace(case, file_name="any_name"), "of any name", lora, case.model())
        (path.parent / "empty").mkdir()
        (path.parent / "strange.safetensors").write_bytes(b"\xff" * 64)
        (path.parent / "settings.json").write_text("{}")
        weights = {"weight": torch.ones(2)}
        save_file(weights, path.parent / "model.safetensors")
        torch.save(weights, path.parent / "model.zip")
        model = path.parent / "model"
        model.mkdir()
        (model / "config.json").write_text('{"model_type": "vit"}')
        save_file(weights, model / "model.safetensors")
        for name in (*_NO_ADAPTERS, model.name):
            require(not case.elsewhere.recognizes(path.parent / name), f"{name!r} is taken for one of its files")


@as_check(
    "output",
    "an adapter that is written and read computes the same in float64, wherever it is read",
    "the scaling, alpha / r, is lost, rounded, counted twice, one for all layers, or kept in the plugin object; or "
    "a file holds the path of another.",
)
def _output(case: FormatCase) -> None:
    with case.written() as (lora, path):
        for what, at in (("", path), (", whose file was moved,", path.parent / f"moved_{path.name}")):
            path.rename(at)
            model = case.model()
            case.load(model, at)
            require_close(f"the output of the loaded model{what}", case.run(model), case.run(lora.model))


@as_check(
    "bits",
    "what was read, written and read again has the same keys and bits",
    "the scaling is multiplied into A or B, or tensors are cast.",
)
def _bits(case: FormatCase) -> None:
    with case.written() as (_, path):
        first, second = case.model(), case.model()
        with tempfile.TemporaryDirectory() as folder:
            case.load(second, case.write(case.load(first, path), Path(folder)))
        require_same_state("the model after reading, writing and reading", second.state_dict(), first.state_dict())


@as_check(
    "replaced",
    "an adapter takes the place of what was written to the same path before",
    "one file for each layer, and whatever lies in the folder is read; or what was read is kept by its path.",
)
def _replaced(case: FormatCase) -> None:
    with case.written() as (_, path):
        case.load(case.model(), path)  # a format must not remember what it reads here
        lora, model = case.trained(target_modules=["to_q"], rank_pattern={}, alpha_pattern={}), case.model()
        case.load(model, case.write(lora, path.parent))
        require_close(
            "the output of the loaded model, where an adapter with more layers was written before,",
            case.run(model),
            case.run(lora.model),
        )


@as_check(
    "full disk",
    "a write that fails on its way leaves what was there, the new adapter, or something that is refused: never "
    "parts of two, or of one",
    "one file after another is written in place. replace_files of lora_plugins.formats writes all of them or none.",
)
def _full_disk(case: FormatCase) -> None:
    apart = "rank_pattern" in case.patterns
    ranks = [{"rank_pattern": {name: 5}} for name in ("to_q", "to_out")] if apart else [{"r": 5}]
    # Whichever of two files is written first is the smaller one once, of layers or of factors.
    for width, fields in ((4, {}), (1, {}), *((4, larger) for larger in ranks)):
        sized = replace(case, width=width)
        new = replace(sized, seed=2).trained(**fields)
        with tempfile.TemporaryDirectory() as folder:
            case.write(new, Path(folder))
            sizes = {file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()}
        for size, old in product(sorted(sizes), (sized.trained(), None)):
            _stopped_write(sized, new, size - 1, old)


def _stopped_write(case: FormatCase, new: LoraModel, size: int, old: LoraModel | None) -> None:
    """Requires that a write which fails for a full disk leaves one adapter, or what is refused.

    No file can grow beyond the size. What is `old` was written to the same path before; it is None for nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / case.file_name if old is None else case.write(old, Path(folder))
        try:
            with no_file_beyond(size):
                case.write(new, Path(folder))
        except Exception:  # whatever the libraries raise that write
            model = case.model()
        else:
            return
        try:
            case.load(model, path)
        except AdapterFileError:
            return
        known = [case.run(each.model) for each in (old, new) if each is not None]
    found = any(torch.allclose(case.run(model), output, rtol=0, atol=TIGHT) for output in known)
    before = "another adapter was written before" if old else "nothing was there before"
    require(found, f"a write failed since no file could have {size + 1} bytes, and what it left is loaded: {before}")


@as_check(
    "whole",
    "an adapter that is more than an A and a B for each layer (use_rslora, a variant, a head, biases, a part of a "
    "layer, a changed base) is written whole, or refused with an AdapterFileError before anything is written",
    "what the format has no place for is left out, as refusals() names nothing.",
)
def _whole(case: FormatCase) -> None:
    for what, fields in ADAPTERS.items():
        model = case.model()
        if _travels(case, f"with {what}", lora := case.trained(**fields), model):
            _require_same_output(f"with {what}", case.run(model), case.run(lora.model))


@as_check(
    "layers",
    "an adapter of convolutions, an embedding, an nn.MultiheadAttention, layers whose names end alike and have a "
    "capital or differ only in a dot, or of rank 1, is written whole, or refused with an AdapterFileError "
    "before anything is written",
    "A and B are squeezed, flattened or transposed, or layers are told apart by a part of their name, by small "
    "letters, or with '_' for each dot.",
)
def _layers(case: FormatCase) -> None:
    for (what, (build, inputs)), r in product(LAYERS.items(), (2, 1)):
        with own_randomness(0):
            trained, model, given = build().double(), build().double(), inputs()
        model.load_state_dict(trained.state_dict())
        lora, of = case.adapted(trained, r=r, target_modules="all"), f"of rank {r} of {what}"
        if _travels(case, of, lora, model):
            _require_same_output(of, model(*given), trained(*given))


def _travels(case: FormatCase, what: str, lora: LoraModel, model: nn.Module) -> bool:
    """Loads the adapter of one model into another, its base, and returns whether the format can write it.

    Raises:
        MismatchError: If it was refused, and something was written.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = case.write(lora, Path(folder))
        except AdapterFileError:
            left = [each.name for each in Path(folder).iterdir()]
            require(not left, f"an adapter {what} was refused, and {left} was written")
            return False
        require(path.name == case.file_name, f"{case.file_name!r} was to be written, and {path.name!r} was")
        case.load(model, path)
    return True


def _require_same_output(what: str, found: Tensor, expected: Tensor) -> None:
    require_close(f"the output of the loaded model, of an adapter {what},", found, expected)


@as_check(
    "untouched",
    "writing leaves the model alone, and what is loaded can be unloaded, bit for bit; no random numbers are drawn, "
    "modules stay in their mode, and nothing is left in the working directory",
    "tensors of the model are changed in place, where a copy is meant; the model is run to find its layers; or "
    "the name of a file has no folder.",
)
def _untouched(case: FormatCase) -> None:
    with case.written() as (lora, path), tempfile.TemporaryDirectory() as here, chdir(here):
        before = {key: value.clone() for key, value in lora.model.state_dict().items()}
        case.write(lora, path.parent / "again")
        require_same_state("the model after writing", lora.model.state_dict(), before)
        model = case.model()
        plain = {key: value.clone() for key, value in model.state_dict().items()}
        randomness = random_states()
        case.load(model, path).unload()
        require_unmoved(randomness)
        require_same_state("the model after loading and unloading", model.state_dict(), plain)
        require(not any(each.training for each in model.modules()), "a model in eval mode is loaded into training mode")
        left = [each.name for each in Path(here).iterdir()]
        require(not left, f"{left} was left in the working directory")


def _refused(case: FormatCase, path: Path, model: nn.Module, why: str) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        case.load(model, path)
    except AdapterFileError:
        require_same_state(f"the model after {why} was refused", model.state_dict(), before)
        return
    refuse(f"{why} is loaded")


@as_check(
    "other model",
    "an adapter for another model is refused with an AdapterFileError, and the model is untouched",
    "keys that the model has no layer for are skipped.",
)
def _other_model(case: FormatCase) -> None:
    with case.written() as (_, path):
        _refused(case, path, replace(case, width=5).model(), "an adapter for layers of another shape")
        smaller = case.model()
        del smaller.attn["to_out"]  # type: ignore[union-attr, operator]
        _refused(case, path, smaller, "an adapter with layers that the model does not have")


@as_check(
    "damaged",
    "a file that was cut is refused with an AdapterFileError, and the model is untouched",
    "an error of a parser is passed on as it is.",
)
def _damaged(case: FormatCase) -> None:
    with case.written() as (_, path):
        files = [file for file in (path, *path.rglob("*")) if file.is_file() and file.stat().st_size > 16]
        for file in files:
            data = file.read_bytes()
            for size in (len(data) - 1, len(data) // 2):
                file.write_bytes(data[:size])
                _refused(case, path, case.model(), f"{file.name} of {size} of {len(data)} bytes")
            file.write_bytes(data)


@as_check(
    "surplus",
    "a file of safetensors with a tensor of another name than those that are known is refused with an "
    "AdapterFileError, and the model is untouched",
    "tensors are looked up by name, and what was not asked for is left out. It may be a bias or a magnitude.",
)
def _surplus(case: FormatCase) -> None:
    with case.written() as (_, path):
        for file in (path, *path.rglob("*")):
            try:
                with safe_open(file, "pt") as opened:
                    metadata = opened.metadata()
            except Exception:  # a folder, or a file of another kind
                continue
            data = file.read_bytes()
            save_file({**load(data), "surplus": torch.ones(2)}, file, metadata)
            _refused(case, path, case.model(), f"{file.name} with a tensor 'surplus'")
            file.write_bytes(data)


@as_check(
    "pickle",
    "nothing is unpickled to recognize, read or sum up a file: whoever made it could have anything run",
    "torch.load without weights_only=True, or a cache of Python objects.",
)
def _pickle(case: FormatCase) -> None:
    with case.written() as (_, path):
        with places_of_unpickling() as places:
            case.load(case.model(), path)
            case.elsewhere.summary(path)
        require(not places, f"a pickle is read in {' and in '.join(sorted(places))}")


@as_check(
    "summary",
    "summary has a line for each layer, with its rank and alpha, without a model",
    "summary needs names from a model, or takes one alpha for all layers.",
)
def _summary(case: FormatCase) -> None:
    with case.written() as (lora, path):
        found, expected = (
            [(layer.r, layer.alpha / layer.r) for layer in layers]
            for layers in (case.elsewhere.summary(path).layers, lora.plans["default"].layers)
        )
        require(sorted(found) == sorted(expected), f"its layers have these ranks and scalings: {sorted(found)}")


_CHECKS: tuple[Check[FormatCase], ...] = (
    _registration,
    _recognized,
    _output,
    _bits,
    _replaced,
    _full_disk,
    _whole,
    _layers,
    _untouched,
    _other_model,
    _damaged,
    _surplus,
    _pickle,
    _summary,
)

FORMAT_CHECKS: dict[str, Check[FormatCase]] = by_name(_CHECKS)
"""All checks of a format by name, in the order they are run."""


def check_format_plugin(
    plugin: AdapterFormat,
    file_name: str = "adapter",
    *,
    options: Mapping[str, Any] | None = None,
    only: Collection[str] | None = None,
    skip: Collection[str] = (),
) -> None:
    """Checks a format with adapters of small models; it need not be registered or installed.

    Args:
        plugin: The format.
        file_name: Name of the folder to write, or of the file where the format has files.
        options: The options that the format is given.
        only: Names of the checks to run; all of `FORMAT_CHECKS` by default.
        skip: Names of checks not to run.

    Raises:
        CheckError: At the first check that fails; an AssertionError that says what was expected, what came, and what
            authors usually got wrong.
        ConfigError: If there is no check of a name, or the options are no mapping.
    """
    case = FormatCase(plugin, elsewhere(plugin), file_name, one_of(options)).varied()
    for check in chosen(FORMAT_CHECKS, only, skip):
        run(check, case, type(plugin).__name__)
