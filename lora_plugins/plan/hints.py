"""What a pattern that matches no module may have meant, from the habits of other libraries and of shells."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from lora_plugins.errors import ConfigError, listing
from lora_plugins.plan.patterns import ends_with, exact_expression, is_risky, matches, nearest, shortest_ends
from lora_plugins.plan.sites import Site

_PART_NAMES = {
    "q": ("q", "query", "q_proj", "query_proj", "q_lin", "to_q", "wq"),
    "k": ("k", "key", "k_proj", "key_proj", "k_lin", "to_k", "wk"),
    "v": ("v", "value", "v_proj", "value_proj", "v_lin", "to_v", "wv"),
}
"""What models call the layers of query, key and value."""

_PART_OF = {name: part for part, names in _PART_NAMES.items() for name in names}

_FUSED_NAMES = frozenset(
    {"qkv", "qkv_proj", "to_qkv", "in_proj", "wqkv", "Wqkv", "query_key_value", "c_attn", "MultiheadAttention"}
)
"""What models call a layer that holds the three in one matrix, and the class of such a layer."""

_NO_LAYER = "The model has no layer of a type that a plugin adapts, outside of modules_to_save."

_MOST_TARGETS = 8
"""How many names a proposal holds at most, so that it can be typed."""


def target_hint(pattern: str, patterns: Sequence[str] | str, sites: Sequence[Site]) -> str:
    """Returns what to write instead of one of the patterns of `target_modules`, which matches no layer."""
    names = [name for site in sites for name in site.names if name]
    return (
        _every_layer(pattern, sites, names)
        or _other_form(pattern, patterns, names)
        or _attention(pattern, patterns, sites, names)
        or nearest_layer(pattern, [name for site in sites for name in site.names])
    )


def nearest_layer(pattern: str, names: Collection[str]) -> str:
    """Offers the names of layers that could be adapted, or says that there is none, not even the model itself."""
    return nearest(pattern, names) if names else _NO_LAYER


def inner_hint(containers: Iterable[str], names: Iterable[str]) -> str:
    """Returns how to name the layers inside of matched modules that are no layers; empty if there are none in them."""
    paths = tuple(f"{name}." for name in containers if name)
    ends = list(dict.fromkeys(_last(name) for name in sorted(names) if name.startswith(paths)))
    return f"Name the layers in it by their ends, such as {ends[:_MOST_TARGETS]}." if ends else ""


def saved_hint(pattern: str, names: Sequence[str], layers: Sequence[str]) -> str:
    """Returns what to write instead of an entry of `modules_to_save` that matches nothing.

    The layers are the modules that have parameters of their own, in the order of the model.
    """
    close = nearest(pattern, names)
    return close if close.startswith("Did") or not layers else f"The last layer of the model is {layers[-1]!r}."


def _every_layer(pattern: str, sites: Sequence[Site], names: Sequence[str]) -> str:
    """Hints at the words for all layers: `all` or a star in a list, and PEFT's `all-linear`."""
    if pattern in ("all", "*"):
        return "Write target_modules='all', not in a list, for every layer that a plugin adapts."
    if pattern != "all-linear":
        return ""
    linear = [name for site in sites if site.class_name.endswith("Linear") for name in site.names]
    ends = shortest_ends(linear, names)
    alone = f", or for linear layers alone {ends}" if 0 < len(ends) <= _MOST_TARGETS else ""
    return f"It is a word of PEFT. Write 'all' for every layer that a plugin adapts, convolutions too{alone}."


def _other_form(pattern: str, patterns: Sequence[str] | str, names: Sequence[str]) -> str:
    """Hints at a list where a string was given, and the other way round."""
    forms = _lists(pattern, names) if isinstance(patterns, str) else _expressions(pattern, patterns, names)
    return next(forms, "")


def _lists(pattern: str, names: Sequence[str]) -> Iterator[str]:
    said = "A plain string is a regular expression over the whole name of a layer."
    entries = [entry.strip(" '\"") for entry in pattern.strip("[](){} ").split(",")]
    found = [name for name in names if any(ends_with(entry, name) for entry in entries)]
    if found and all(any(ends_with(entry, name) for name in names) for entry in entries):
        yield f"{said} To match the ends of names, write a list: {entries} matches {listing(found, 2)}."
    anywhere = rf".*(?:{pattern})"
    if not is_risky(pattern) and (found := _matched(anywhere, names)):
        yield f"{said} {anywhere!r} matches {listing(found, 2)}."


def _expressions(pattern: str, patterns: Sequence[str], names: Sequence[str]) -> Iterator[str]:
    said = "An entry of a list is the end of a name, word for word."
    if _is_expression(pattern, names):
        entries = [each if _is_expression(each, names) else rf"(?:.*\.)?{exact_expression(each)}" for each in patterns]
        whole = "|".join(entries)
        yield f"{said} As a regular expression, target_modules={whole!r} matches {listing(_matched(whole, names), 2)}."
    whole = ".*".join(exact_expression(part) for part in pattern.split("*"))
    meant = [] if is_risky(whole) else _matched(whole, names)
    end = pattern.rpartition("*")[2].lstrip(".")
    found = [name for name in names if ends_with(end, name)] if end else []
    if found and len(found) <= len(meant or found):  # an end that matches more than the pattern would adapt more
        yield f"{said} {[end]} matches {listing(found, 2)}."
    elif meant:
        yield f"{said} As a regular expression, target_modules={whole!r} matches {listing(meant, 2)}."


def _is_expression(entry: str, names: Sequence[str]) -> bool:
    """Whether an entry of a list means something as a regular expression only."""
    literal = any(ends_with(entry, name) for name in names)
    return not literal and not is_risky(entry) and bool(_matched(entry, names))


def _attention(pattern: str, patterns: Sequence[str] | str, sites: Sequence[Site], names: Sequence[str]) -> str:
    """Hints at query, key and value: layers of their own in some models, by several names, one matrix in others."""
    fused = [site for site in sites if site.parts and {site.class_name, _last(site.name)} & _FUSED_NAMES]
    ends = shortest_ends((site.name for site in fused), names)[:_MOST_TARGETS]
    asked = _parts([patterns] if isinstance(patterns, str) else patterns)
    apart = list(dict.fromkeys(_last(name) for name in names if _PART_OF.get(_last(name)) in asked))
    if not _parts([pattern]) or not (ends or apart):
        return ""
    if not ends:
        return f"Query, key and value are layers of their own in this model: target_modules={apart}."
    parts = f", and with fused_parts={dict.fromkeys(ends, asked)} only what is named" if len(asked) < 3 else ""
    return f"Query, key and value are one matrix in this model: target_modules={ends} adapts all three{parts}."


def _parts(patterns: Sequence[str]) -> list[str]:
    """Returns which of `q`, `k` and `v` some patterns name; all of them where they only name a fused layer."""
    words = {word for pattern in patterns for word in re.findall(r"[A-Za-z_]\w*", pattern)}
    found = {_PART_OF[word] for word in words & _PART_OF.keys()}
    return [part for part in _PART_NAMES if part in found or (not found and words & _FUSED_NAMES)]


def _matched(expression: str, names: Sequence[str]) -> list[str]:
    try:
        return matches("target_modules", expression, names)[expression]
    except ConfigError:
        return []


def _last(name: str) -> str:
    return name.rpartition(".")[2]
