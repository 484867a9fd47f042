"""The parts of a diffusion pipeline: a file may hold adapters of several, and a model may be one of them or have them.

A diffusers pipeline is not a module. One of its parts is loaded by itself, or all of them together as the children of
one module that are named as the pipeline names them: `nn.ModuleDict({"unet": pipe.unet, "text_encoder": ...})`.
"""

from collections.abc import Iterable, Mapping

from torch import nn

from lora_plugins.errors import AdapterFileError, ConfigError, listing, near
from lora_plugins.field_checks import choice_of, optional
from lora_plugins.inplace import base_class_of

COMPONENTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "text_encoder_4",
    "transformer_ref",
    "connectors",
    "text_conditioner",
)
"""Names of the parts of a pipeline that have adapters, in the order in which random numbers are drawn for them."""

_DENOISER, _SECOND = "transformer", "transformer_2"
"""The two transformers of Wan 2.2. A file is of one of them, by the name of the first; who loads it says which."""

OTHER_TRANSFORMERS = (_SECOND, "transformer_ref")
"""The transformers that files which name the first one are loaded into, where that is said or there is no first one."""

_OTHERWISE: Mapping[str, tuple[str, ...]] = {
    _DENOISER: OTHER_TRANSFORMERS,
    "text_encoder_3": ("text_encoder_2", "text_encoder"),
}
"""What other pipelines call a part that files name so, in the order in which it is looked for.

T5 is the third text encoder of SD 3, the second of Flux, and the only one of PixArt.
"""

ORIGINAL = "diffusion_model"
"""What ComfyUI and the authors of models call the denoiser, whose layers have their original names then."""

_CONDITIONER = "llm_adapter"
"""What the authors of Anima call its text conditioner: within the denoiser there, a part of its own in diffusers."""

_WORDS: Mapping[str, str] = {
    "UNet": "unet",
    "TextConditioner": "text_conditioner",
    "Text": "text_encoder",
    "T5": "text_encoder",
    "Transformer": "transformer",
}
"""Words in the names of classes, and which part a model of such a class is."""


def paths_read(found: Mapping[str, Iterable[str]], model: nn.Module, asked: str | None) -> dict[str, str]:
    """Returns the parts of a file that are read, and where each is in a model; empty for the model itself.

    `found` has for each part the names of its layers. A part that is asked for is read alone.

    Raises:
        AdapterFileError: If the file has several parts and none was asked for, or not the one that was, or if two of
            them are one of the model.
    """
    check_name(asked)
    children, renamed = _children(model), _named_otherwise(found, model, asked)
    parts = {name: renamed.get(name, name) for name in found}
    if asked is not None and asked not in parts.values():
        raise AdapterFileError(f"The adapter has no part {asked!r}. {near(asked, parts.values())}")
    for part in parts.values():
        names = sorted(name for name, own in parts.items() if own == part and asked in (None, part))
        if len(names) > 1:
            raise AdapterFileError(
                f"The adapter has the parts {listing(names)}, which are both {part!r} of this model, and it cannot be "
                "told which of them is meant. Take one of the two out of the file."
            )
    if asked is None and children:
        lacking = [name for name, part in parts.items() if part not in children]
        if lacking:
            raise AdapterFileError(f"The adapter has the parts {listing(lacking)}, which the model does not have.")
        return parts
    if asked is None and len(found) > 1:
        told = part_told(model)
        likely = told if told in found else min(found)
        raise AdapterFileError(
            f"The adapter has the parts {listing(sorted(found))}, and the model is one of them. Say which: "
            f"format_options={{'component': {likely!r}}}; the others are left out then."
        )
    return {name: part if part in children else "" for name, part in parts.items() if asked in (None, part)}


def _named_otherwise(found: Mapping[str, Iterable[str]], model: nn.Module, asked: str | None) -> dict[str, str]:
    """Returns what a model calls parts that files name after another pipeline's, by their names in the file."""
    children = _children(model)
    names = {part: next(filter(children.__contains__, (part, *others)), part) for part, others in _OTHERWISE.items()}
    if asked in OTHER_TRANSFORMERS:
        names[_DENOISER] = asked
    renamed = {part: name for part, name in names.items() if name not in found}
    first = dict(model.named_children()).get("text_encoder")
    if first is not None and any("Llama" in name for name in class_names(first)):  # as in HunyuanVideo, beside CLIP
        renamed["text_encoder_4"] = "text_encoder"
        if any("encoder" in name for name in found.get("text_encoder", ())):  # layers of CLIP
            renamed["text_encoder"] = "text_encoder_2"
    return renamed


def part_of(names: Iterable[str], model: nn.Module | None, asked: str | None) -> dict[str, tuple[str, str]]:
    """Splits the name of each layer that is written into the part of the pipeline, as files name it, and the rest.

    What is asked for is which part the model is, or which of its parts is written alone. Where a file is converted,
    there is no model.

    Raises:
        ConfigError: If the part that the model is can neither be inferred nor was given; if the part that was asked for
            has no layers; or if no file can hold both of two parts.
    """
    check_name(asked)
    split = {name: name.partition(".") for name in names}
    firsts = {first for first, _, _ in split.values()}
    if firsts <= {*COMPONENTS} and (asked is None or model is None or asked in _children(model)):
        if asked not in (None, *firsts):
            raise ConfigError(f"The adapter has no layers in {asked!r}. {near(str(asked), firsts)}")
        if asked is None and {_DENOISER, _SECOND} <= firsts:
            raise ConfigError(
                f"No file of this format has layers of {_DENOISER!r} and of {_SECOND!r}: save each of them by itself, "
                f"format_options={{'component': {_SECOND!r}}}. load_lora_weights of diffusers reads that with "
                "load_into_transformer_2=True, load_adapter with the same option."
            )
        return {name: (_in_files(first), rest) for name, (first, _, rest) in split.items() if asked in (None, first)}
    part = asked or part_told(model)
    if part is None:
        raise ConfigError(
            "It cannot be told which part of a pipeline the model is. If it is one of "
            f"{listing(COMPONENTS, len(COMPONENTS))}, say so: format_options={{'component': 'unet'}}. Files of "
            "pipelines have no other parts: for a model such as a VAE or a ControlNet, write format='peft'."
        )
    return {name: (_in_files(part), name) for name in split}


def denoiser_of(model: nn.Module, asked: str | None) -> str:
    """Returns the name of the denoiser, in a pipeline or where the model itself is one; see `paths_read`."""
    return "unet" if "unet" in {asked, part_told(model), *_children(model)} else "transformer"


def with_conditioner(part: str, name: str, model: nn.Module) -> tuple[str, str]:
    """Returns the part and the name of a layer that the denoiser of a file has; see `_CONDITIONER`.

    The name has dots or underscores. If the model has such a module itself, as the authors do, nothing changes.
    """
    if not name.startswith(_CONDITIONER) or any(each.endswith(_CONDITIONER) for each, _ in model.named_modules()):
        return part, name
    return "text_conditioner", name[len(_CONDITIONER) + 1 :]


def check_name(component: str | None) -> None:
    """Refuses what is not the name of a part.

    Raises:
        ConfigError: If there is no such part.
    """
    optional(choice_of(*COMPONENTS))("format_options: component", component)


def _children(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_children() if name in COMPONENTS}


def _in_files(part: str) -> str:
    return _DENOISER if part == _SECOND else part


def part_told(model: nn.Module | None) -> str | None:
    """Returns which part a model is, inferred from the names of its classes."""
    if model is None:
        return None
    return next((part for name in class_names(model) for word, part in _WORDS.items() if word in name), None)


def class_names(module: nn.Module) -> list[str]:
    """Returns the names of the class that a module had before it was adapted, and of those that it is derived from."""
    return [cls.__name__ for cls in base_class_of(module).__mro__]
