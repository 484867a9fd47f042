"""The model card of an adapter: what it is of, what it adapts, what was measured, and how it is loaded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from lora_plugins.errors import counted
from lora_plugins.hub.client import hub
from lora_plugins.plugins import AdapterSummary


@dataclass(frozen=True)
class CardContent:
    """What a model card says.

    Args:
        repository: `owner/name`.
        format: Name of the format of the files.
        summary: What is in them.
        base_model: Name of the base model, as the Hub has it.
        license: The license, as the Hub names it.
        metrics: What was measured, by name.
        description: A text of the author's.
    """

    repository: str
    format: str
    summary: AdapterSummary
    base_model: str | None = None
    license: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    description: str = ""


def model_card(content: CardContent) -> str:
    """Returns the text of a `README.md`, with the metadata that the Hub reads."""
    metadata = hub().ModelCardData(
        license=content.license,
        base_model=content.base_model,
        library_name="peft" if content.format == "peft" else None,
        tags=["lora", "lora_plugins"],
    )
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {content.repository.rpartition('/')[2]}", *_body(content)]
    return "\n\n".join(parts) + "\n"


def _body(content: CardContent) -> Iterator[str]:
    summary = content.summary
    elements = sum(layer.elements for layer in summary.layers) + sum(summary.values.values())
    base = f" of `{content.base_model}`" if content.base_model else ""
    yield from filter(None, [content.description.strip()])
    yield (
        f"A LoRA adapter of {elements:,} parameters on {counted(len(summary.layers), 'layer')}{base}, in the format "
        f"`{content.format}`."
    )
    yield "## How to load it\n\n`model` is the base model with its pretrained weights."
    for title, language, code in _ways(content):
        yield f"{title}:\n\n```{language}\n{code}\n```"
    if content.metrics:
        measured = [(name, f"{value:g}") for name, value in content.metrics.items()]
        yield "## What was measured\n\n" + _table(("metric", "value"), measured)
    layers = [(f"`{each.name}`", each.r, f"{each.alpha:g}", f"{each.elements:,}") for each in summary.layers]
    yield "## What is adapted\n\n" + _table(("layer", "r", "alpha", "parameters"), layers)
    if summary.values:
        yield f"Trained in full: {', '.join(f'`{name}`' for name in summary.values)}."
    yield "\n".join(f"- {key}: {value}" for key, value in summary.details.items())


def _ways(content: CardContent) -> list[tuple[str, str, str]]:
    """Returns how the adapter is loaded in three libraries: a title, a language and code for each."""
    repository = content.repository
    ours = f'from lora_plugins import LoraModel\n\nLoraModel.load_adapter(model, "hf://{repository}")'
    convert = f"lora-plugins convert hf://{repository} converted --to peft --model MODULE:NAME"
    peft = f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, "{repository}")'
    diffusers = f'pipe.load_lora_weights("{repository}")'
    return [
        ("With lora_plugins", "python", ours),
        ("With PEFT", "python", peft) if content.format == "peft" else ("With PEFT, converted", "sh", convert),
        ("With diffusers", "python", diffusers)
        if content.format == "diffusers"
        else ("With plain PyTorch, merged", "python", f"{ours}.merge_and_unload()"),
    ]


def _table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
