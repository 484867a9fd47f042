"""Which network a name stands for, whether its weights can be had, and what images it takes."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_plugins.errors import ConfigError
from lora_plugins.names import MANIFEST
from lora_plugins.tasks.autoconfig.found import LABELS, MASKS
from lora_plugins.tasks.errors import WeightsError, unknown
from lora_plugins.tasks.file_kinds import WEIGHTS_FILES, is_of_its_kind
from lora_plugins.tasks.hub import hub_answers

DEFAULT = "timm/tf_efficientnet_lite0"
"""The model of both tasks, unless a flag names another one: small, and its weights are installed, alike everywhere."""

LIBRARIES: Mapping[str, tuple[str, ...]] = {
    LABELS: ("timm", "transformers"),
    MASKS: ("smp", "timm", "torchvision", "transformers"),
}
DECODER = "Unet"
OF_TIMM = "tu-"
"""What smp calls an encoder of timm begins with."""

IMAGENET: Mapping[str, list[float]] = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
WORDS = frozenset({"none", "null", "random", "scratch", "pretrained", "imagenet", "default"})
"""What a configuration or another program takes in place of a file of weights."""

REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""What the hub calls a model."""


@dataclass(frozen=True)
class Choice:
    """A network.

    Attributes:
        name: What a user calls it.
        arguments: Those of a `ModelConfig`, except for `num_classes`.
        size: Height and width of its images, if it says.
        weights: Where its weights come from, in words.
    """

    name: str
    arguments: Mapping[str, Any]
    size: tuple[int, int] | None
    weights: str


@dataclass(frozen=True)
class _Found:
    source: str
    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Any] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    repository: str | None = None
    timm_name: str = ""


def checked_weights(weights: str | None) -> str | None:
    """Returns the absolute path of a file of weights.

    Raises:
        WeightsError: If there is no such file, or none of a kind that holds weights.
    """
    if weights is None:
        return None
    path = Path(weights)
    if weights.lower() in WORDS and not path.exists():
        raise WeightsError(
            f"--weights is {weights}, and takes a file. Leave it out for the pretrained weights. Random ones are for "
            "a configuration of fit, `weights: none` of the model: lora-plugins recipes."
        )
    if not path.exists():
        beside = [each.name for each in path.parent.glob("*")] if path.parent.is_dir() else []
        raise WeightsError(f"--weights: {unknown('file', str(path.name), beside)}")
    if (path / MANIFEST).is_file():
        raise WeightsError(
            f"--weights is {weights}, an adapter, which holds no weights of its base. Take the merged file of its run, "
            f"or make one: lora-plugins export {weights} NAME.safetensors."
        )
    if path.is_file() and path.suffix not in WEIGHTS_FILES:
        raise WeightsError(f"--weights is {weights}. A file of weights ends in {', '.join(WEIGHTS_FILES)}.")
    if path.is_file() and not is_of_its_kind(path):
        raise WeightsError(
            f"--weights is {weights}, which holds no weights: safetensors or torch.save did not write it, or it is "
            "cut off. Take another file."
        )
    return str(path.absolute())


def choose_model(task: str, model: str | None, weights: str | None, size: tuple[int, int] | None) -> Choice:
    """Finds the network that a flag names, or the default one.

    `model` is LIBRARY/NAME, the name of a timm model, or OWNER/NAME on the hub; without `weights`, it has the
    pretrained ones.

    Raises:
        ConfigError: For a name that does not exist, with near matches, or weights that cannot be had.
    """
    name = DEFAULT if model is None else model
    library, rest = _split(task, name)
    # timm fits pretrained position embeddings to a size when it loads them; those of a file are fitted in each step.
    resized = {} if size is None else {"img_size": [*size]} if weights is None else {"dynamic_img_size": True}
    found = _OF_LIBRARY[library](task, rest, resized)
    source, words = _weights_of(name, found, weights)
    options = {"options": dict(found.options)} if found.options else {}
    # The default model has a classifier of ImageNet's 1,000 classes, which would be kept for 1,000 others.
    head = {"head": "new"} if task == LABELS and model is None and weights is None else {}
    arguments = {"source": found.source, "name": found.name, "weights": source, **head, **options, **found.further}
    return Choice(f"{name} (the default)" if model is None else name, arguments, found.size, words)


def _split(task: str, name: str) -> tuple[str, str]:
    """The library of a network, which a name need not begin with, and what the library calls the network."""
    library, slash, rest = name.partition("/")
    if library in LIBRARIES[task]:
        return library, rest
    if not slash:
        return "timm", name
    if library not in _OF_LIBRARY:
        return "transformers", name
    raise ConfigError(
        f"--model is {name}, and models of {library} are not for {task} here. Write "
        f"{' or '.join(f'{each}/NAME' for each in LIBRARIES[task])}, or leave it out for {DEFAULT}."
    )


def _weights_of(name: str, found: _Found, weights: str | None) -> tuple[str, str]:
    """The weights of a network as a `ModelConfig` takes them, and in words."""
    from lora_plugins.tasks.models import INSTALLED, installed_file

    if weights is not None:
        return weights, Path(weights).name
    if found.timm_name in INSTALLED:
        installed_file(found.timm_name)
        return f"package:{found.timm_name}", f"those of {INSTALLED[found.timm_name].distribution}"
    _check_reachable(name, found)
    return "pretrained", "pretrained"


def _timm(task: str, name: str, resized: Mapping[str, Any]) -> _Found:
    import timm

    if ":" not in name and not timm.is_model(name):
        raise unknown("model of timm", name, timm.list_models())
    config: Any = timm.get_pretrained_cfg(name) if ":" not in name else None
    fixed = bool(config and config.fixed_input_size)
    own = (int(config.input_size[1]), int(config.input_size[2])) if config else None
    repository = config.hf_hub_id if config else None
    if task == MASKS:
        if fixed:
            raise ConfigError(
                f"--model timm/{name} has features of one size, and a decoder for masks needs several. Take a "
                f"convolutional network, such as timm/convnext_nano, or none for the default, {DEFAULT}."
            )
        return _Found("smp", DECODER, {"encoder_name": OF_TIMM + name}, repository=repository, timm_name=name)
    return _Found("timm", name, resized if fixed else {}, size=own, repository=repository, timm_name=name)


def _transformers(task: str, name: str, resized: Mapping[str, Any]) -> _Found:
    if name == "segformer":
        return _Found("transformers", name, further=IMAGENET)
    return _Found("transformers", name, repository=None if Path(name).is_dir() else name)


def _smp(task: str, name: str, resized: Mapping[str, Any]) -> _Found:
    decoder, _, encoder = name.partition(":")
    if not encoder:
        raise ConfigError(f"--model smp/{name} names no encoder. Write smp/{decoder or DECODER}:resnet18, for example.")
    if encoder.startswith(OF_TIMM):
        return replace(_timm(MASKS, encoder.removeprefix(OF_TIMM), resized), name=decoder)
    return _Found("smp", decoder, {"encoder_name": encoder}, further=IMAGENET)


def _torchvision(task: str, name: str, resized: Mapping[str, Any]) -> _Found:
    return _Found("torchvision", name)


_OF_LIBRARY: Mapping[str, Callable[[str, str, Mapping[str, Any]], _Found]] = {
    "timm": _timm,
    "transformers": _transformers,
    "smp": _smp,
    "torchvision": _torchvision,
}


def _check_reachable(name: str, found: _Found) -> None:
    if found.repository is None or _is_cached(found.repository) or hub_answers():
        return
    library = difflib.get_close_matches(name.partition("/")[0], _OF_LIBRARY, n=1)
    hint = f" Or did you mean {library[0]}/{name.partition('/')[2]}?" if library and library[0] not in name else ""
    raise ConfigError(
        f"The pretrained weights of {name} are on the Hugging Face hub, which cannot be reached from here. Download "
        f"them on a machine that can reach it ({found.repository}), and give the file: --weights FILE "
        f"({', '.join(WEIGHTS_FILES[:2])}). Those of the default model, {DEFAULT}, are installed.{hint}"
    )


def _is_cached(repository: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "pytorch_model.bin")
    if not REPOSITORY.fullmatch(repository):
        raise ConfigError(
            f"--model: {repository!r} is no name of a model. Write timm/NAME, or OWNER/NAME of the hub, or "
            "for masks smp/DECODER:ENCODER; or leave it out for the default."
        )
    return any(isinstance(try_to_load_from_cache(repository, name), str) for name in names)
