"""The result as Markdown."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.exactness.checks import CHECKS, TOLERANCE, Library, Result
from lora_plugins.errors import counted


def markdown(
    results: Sequence[Result], ours: str, peers: Sequence[Library], versions: Mapping[str, str], command: str
) -> str:
    """Returns the page, with a column for our own library and one for each of the peers beside it."""
    names = [ours, *(peer.name for peer in peers)]
    return "\n".join(
        [
            "# Exact on every model",
            "",
            f"Made by `{command}` with {', '.join(f'{name} {version}' for name, version in versions.items())}.",
            "",
            'Every layer of every model gets a random adapter of rank 2 (`init="none"`), in float64 and eval mode. '
            f"Outputs have to agree to {TOLERANCE:.0e}, relative to the largest element. The checks:",
            "",
            *(f"- **{name}**: {text}." for name, text in CHECKS.items()),
            "",
            *_skips(peers),
            "## Passed",
            "",
            *_summary(results, names),
            "",
            *_failures(results, names),
            *_details(results, names),
        ]
    )


def _skips(peers: Sequence[Library]) -> list[str]:
    lines = [f"- {peer.name} is not held to **{name}**: {why}." for peer in peers for name, why in peer.skipped.items()]
    return [*lines, ""] if lines else []


def _summary(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    suites = list(dict.fromkeys(result.suite for result in results))
    rows = []
    for suite in suites:
        counts = [_count(r for r in results if r.suite == suite and r.library == name) for name in names]
        rows.append([suite, *counts])
    rows.append(["all", *(_count(r for r in results if r.library == name) for name in names)])
    return _table(["suite", *names], rows)


def _count(results: Iterable[Result]) -> str:
    results = list(results)
    return f"{sum(result.passed for result in results)} of {len(results)}"


def _failures(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    """The failures of our own library, in full."""
    lines = [
        f"- {result.suite}, {result.name}: **{check}**: {_code(reason)}"
        for result in results
        if result.library == names[0]
        for check, reason in result.failures.items()
    ]
    return ["## Failures of lora_plugins", "", *(lines or ["None."]), ""]


def _details(results: Sequence[Result], names: Sequence[str]) -> list[str]:
    lines = [
        "## Every model",
        "",
        "`layers` counts adapted layers. `unused` counts weights whose gradient is zero in the untouched model too "
        "(heads and branches that its forward does not use); the gradients of all others are checked. `bare` counts "
        "parameters of two or more dimensions that are no layer's weight, such as position embeddings; LoRA leaves "
        "them alone. `worst` is the largest relative difference of an output. All names and numbers stand in the file "
        "of JSON lines beside this page.",
        "",
    ]
    for suite in dict.fromkeys(result.suite for result in results):
        found = {(r.name, r.library): r for r in results if r.suite == suite}
        cases = sorted({name for name, _ in found})
        rows = [_row(name, [found.get((name, library)) for library in names]) for name in cases]
        header = ["model", "layers", "unused", "bare", "worst", *names]
        lines += [f"### {suite}", "", *_table(header, rows), ""]
    return lines


def _row(name: str, results: Sequence[Result | None]) -> list[str]:
    ours = results[0]
    facts = ["", "", "", ""]
    if ours is not None:
        worst = max((error for check, error in ours.errors.items() if check != "gradients"), default=0.0)
        facts = [str(ours.layers), str(len(ours.unused) or ""), str(len(ours.bare) or ""), f"{worst:.0e}"]
    return [name, *facts, *(_verdict(result) for result in results)]


def _verdict(result: Result | None) -> str:
    if result is None:
        return ""
    left_out = f" ({counted(len(result.left_out), 'layer')} left out)" if result.left_out else ""
    if result.passed:
        return "pass" + left_out
    reason = next(iter(result.failures.values()))
    short = reason if len(reason) <= 90 else reason[:87] + "..."
    return f"**{', '.join(result.failures)}**: {_code(short)}"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'").replace("|", "/") + "`"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
