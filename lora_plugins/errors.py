"""The errors of lora_plugins, and the near matches that their messages offer."""

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_HALF = 100
"""Characters that are shown of either end of a long text."""

_SCHEME = re.compile(r"[A-Za-z][\w+.-]+:")
"""What addresses begin with, as a part of a path; a drive has one letter."""


class LoraError(Exception):
    """Base class of every error that lora_plugins raises on purpose."""


class ConfigError(LoraError, ValueError):
    """A field of a configuration has a value that it cannot have."""


class TargetError(ConfigError):
    """A pattern matches no module, or modules that cannot be adapted as asked."""


class PluginError(LoraError):
    """A plugin cannot be loaded, breaks its contract, or claims what another one owns."""


class StateError(LoraError, RuntimeError):
    """The call does not fit the model's present state, such as training while merged."""


class MergeError(LoraError):
    """Merging would be lossy or would change a layer that is not adapted."""


class AdapterFileError(LoraError):
    """An adapter folder is damaged, incomplete, or was made for another model."""


@contextmanager
def noted(place: str) -> Iterator[None]:
    """Says of an error that a plugin's own code raises where that was; those raised on purpose say it themselves.

    Args:
        place: The method, the plugin, and what it was called for.
    """
    try:
        yield
    except Exception as error:
        add_place(error, place)
        raise


def add_place(error: Exception, place: str) -> None:
    """Says of an error where it was raised, as `noted` does, where a block would cost more than what is in it."""
    if not isinstance(error, LoraError):
        error.add_note(f"It was raised in {place}.")


ALIKE, BEHIND = 0.5, 0.15
"""How much a near match has in common with a name at least, and how far it is behind the nearest at most."""

MOST = 3
"""How many near matches are offered."""

SHORTEST_BEGINNING = 4
"""Letters of a name that can be the beginning of another one."""


def counted(number: int, one: str, several: str = "") -> str:
    """Returns a number of things, such as `1 image` or `2 images`.

    Args:
        number: How many.
        one: What a single one is called, if need be with its verb: `image is`.
        several: What others are called: `images are`; by default `one` with an s.
    """
    return f"{number} {one if number == 1 else several or f'{one}s'}"


def near(name: str, candidates: Iterable[str]) -> str:
    """Returns the sentence that offers near matches, or lists what there is."""
    known = sorted({*candidates} - {""})  # a model itself has no name
    if matches := near_matches(name, known):
        return f"Did you mean {listing(matches[:MOST])}?"
    return f"There is {listing(known, 12)}." if known else "There are none."


def near_matches(name: str, candidates: Iterable[str]) -> list[str]:
    """Returns the names that a misspelt one may stand for, the likeliest first."""
    alike = sorted((-_likeness(name, each), len(each), each) for each in candidates)
    return [each for away, _, each in alike if -away >= max(ALIKE, -alike[0][0] - BEHIND)]


def _likeness(name: str, candidate: str) -> float:
    """Returns what two names have in common, from 0 to 1; a name may also be the beginning of a longer one."""
    whole = difflib.SequenceMatcher(None, candidate, name)
    begun = len(candidate) > len(name) >= SHORTEST_BEGINNING
    part = difflib.SequenceMatcher(None, candidate[: len(name)], name) if begun else whole
    return max(each.ratio() if each.quick_ratio() >= ALIKE else 0.0 for each in (whole, part))


def no_folder(path: Path) -> str:
    """Explains why a path is no folder: which part of it does not exist, and what has a similar name."""
    parent, missing = _break(path)
    if (parent / missing).exists():
        return f"{parent / missing} is a file, and a folder is expected."
    folders = [each for each in parent.iterdir() if each.is_dir()]
    return f"There is no folder {path}: {_lacking(parent, missing, folders)}"


def nothing_there(path: Path) -> str:
    """Explains which part of a path does not exist, and what has a similar name."""
    parent, missing = _break(path)
    return _lacking(parent, missing, parent.iterdir())


def _break(path: Path) -> tuple[Path, str]:
    """Returns the innermost existing folder of a path, and the name that is missing in it."""
    parent = next(folder for folder in path.absolute().parents if folder.is_dir())
    return parent, path.absolute().relative_to(parent).parts[0]


def _lacking(parent: Path, missing: str, there: Iterable[Path]) -> str:
    if (link := parent / missing).is_symlink():
        return f"{link} is a link to {link.readlink()}, where nothing is."
    if _SCHEME.fullmatch(missing):
        return "An address is not read: download what is there, and name that file or folder."
    if missing == "-":
        return "The standard input is not read: name a file or folder."
    beside = [each.name for each in there if not each.name.startswith(".")]
    hint = f" {near(missing, beside)}" if beside and len(parent.parts) > 1 else ""
    return f"{parent} has no {missing!r}.{hint}"


def quoted(text: str) -> str:
    """Returns a text in quotation marks, without the middle of a long one, as an expression that names every layer."""
    said = repr(text)
    return said if len(said) <= 2 * _HALF else f"{said[:_HALF]} ... {said[-_HALF:]}"


def sentence(said: object) -> str:
    """Returns what another error says with one mark at its end, so that a further sentence can follow."""
    text = str(said).strip()
    return text if text.endswith((".", "?", "!")) else f"{text}."


def listing(names: Iterable[str], most: int = 8) -> str:
    """Returns quoted names joined by commas; those beyond `most` are counted instead."""
    listed = [repr(name) for name in names]
    if len(listed) > most:
        listed = [*listed[:most], f"... ({len(listed) - most} more)"]
    return ", ".join(listed)
