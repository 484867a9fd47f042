"""Runs all cases and writes the table of docs/modules.md: `python -m tests.modules [PART OF A NAME ...]`.

Results of earlier runs stay in build/modules.json, so that a part can be run again.
"""

import json
import sys
import traceback
from importlib import metadata
from pathlib import Path

from lora_plugins.integrations.lightning import alias_pytorch_lightning

RESULTS = Path("build/modules.json")
PAGE = Path("docs/modules.md")

HEAD = """# Modules of others

LightningModules as they were published, unchanged, with random weights and small synthetic data: each is fitted without
the callback and with it (`target_modules="all"`, `r=2`, two epochs).

- **fit**: adapters move, the base does not, and the checkpoint leaves it out;
- **resume**: a fresh module goes on from the first epoch;
- **validate**: a fresh module with the file has the metrics of the trained one;
- **load**: `load_from_checkpoint` gives every tensor of the trained module;
- **merge**: after `fit` with the default, the module has the classes and keys of the untouched one, and works.

`make test-modules` runs them, and `python -m tests.modules` writes this table. What is not "yes" has a reason below it.
SemanticSegmentationTask-fcn is that class with `model="fcn"`, and so on.
"""

TAIL = """Classes of lightly are those of its documentation, put together of its heads, losses and memory banks. SwaV
normalizes its prototypes ahead of each step: they are in `modules_to_save`.

Tried, and not in the table: pyannote-audio 4.0.7 needs torchaudio 2.11, which torch 2.13 cannot load. Beside torch
2.11, PyanNet with its VoiceActivityDetection on made sounds is "yes" in all columns, with
`modules_to_save=["classifier"]`: `setup` builds that layer anew, with random weights. The callback of
finetuning-scheduler 2.14.1 thaws layers of the base by its own schedule, whatever its `max_depth`: the run stops at its
first batch, and the message names them. It reads the names of a schedule before LoraCallback adapts: with one that
names A and B, call `LoraModel(module, config)` ahead of `fit`, and the run is exact, `restore_best` and resuming too.
"""


def main(parts: list[str]) -> None:
    """Runs the cases whose ids have one of these parts, or all, and writes the table of all results so far."""
    alias_pytorch_lightning()
    from tests.modules.case import STEPS, check, forget
    from tests.modules.cases import CASES

    RESULTS.parent.mkdir(exist_ok=True)
    results = _results()
    for case in CASES.values():
        if parts and not any(part in case.id for part in parts):
            continue
        found = {}
        for step in STEPS:
            try:
                check(case, step)
                found[step] = "yes"
            except Exception as error:  # of whichever package it is
                traceback.print_exc()
                found[step] = f"{type(error).__name__}: {error}"
        forget()
        results = {**_results(), case.id: found}
        print(case.id, {step: text[:200] for step, text in found.items()}, flush=True)
        RESULTS.write_text(json.dumps(results, indent=1))
    PAGE.write_text(_page(results, CASES, STEPS))


def _results() -> dict[str, dict[str, str]]:
    return dict(json.loads(RESULTS.read_text())) if RESULTS.exists() else {}


def _page(results, cases, steps) -> str:
    rows = ["| package | class | " + " | ".join(steps) + " |", "| --- | --- |" + " --- |" * len(steps)]
    notes: dict[str, int] = {}
    for case in (case for case in cases.values() if case.id in results):
        cells = []
        for step in steps:
            outcome = results[case.id][step]
            reason = case.expected.get(step, "not known yet")
            cells.append("yes" if outcome == "yes" else f"no ({notes.setdefault(reason, len(notes) + 1)})")
        rows.append(f"| {case.package} {metadata.version(case.package)} | {case.name} | " + " | ".join(cells) + " |")
    listed = [f"{number}. {reason}" for reason, number in notes.items()]
    with_lightning = f"With torch {metadata.version('torch')} and lightning {metadata.version('lightning')}."
    return "\n".join([HEAD, with_lightning, "", *rows, "", *listed, "", TAIL]).rstrip() + "\n"


if __name__ == "__main__":
    main(sys.argv[1:])
