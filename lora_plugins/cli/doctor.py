"""`lora-plugins doctor`: checks an installation, and says what to do about what it finds."""

import difflib
import platform
import shutil
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

import lora_plugins
from lora_plugins.cli.commands import GROUP as COMMANDS
from lora_plugins.cli.commands import installed_commands
from lora_plugins.cli.requirements import Requirement, requirements
from lora_plugins.devices import default_device
from lora_plugins.errors import ConfigError, LoraError, PluginError, listing, near
from lora_plugins.kernels import DISABLE_VARIABLE, kernel_report
from lora_plugins.names import DISTRIBUTION
from lora_plugins.plugins import (
    ALLOW_VARIABLE,
    BLOCK_VARIABLE,
    GROUP,
    KINDS,
    LOAD_VARIABLE,
    PluginInfo,
    default_registry,
    names_in,
    require_installation,
)

OUR_MAIN = "lora_plugins.cli.main"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        mark: `ok`; `note`, of which one should know; or `problem`.
        what: What was found.
        advice: What to do about it.
    """

    mark: Literal["ok", "note", "problem"]
    what: str
    advice: str = ""


def run(_: Namespace) -> int:
    """Prints what was found; returns 1 if there is a problem."""
    require_installation()
    problems = 0
    for title, check in CHECKS.items():
        print(f"{title}:")
        for finding in check():
            problems += finding.mark == "problem"
            print(f"  [{finding.mark}] {finding.what}")
            if finding.advice:
                print(f"      -> {finding.advice}")
    print(f"\n{problems or 'No'} problem{'' if problems == 1 else 's'} found.")
    return 1 if problems else 0


def _installation() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("ok", f"lora_plugins {metadata.version(DISTRIBUTION)} in {Path(lora_plugins.__file__).parent}")
    kind = default_device().type
    version = f" {torch.version.cuda}" if kind == "cuda" else ""
    found = "CPU only" if kind == "cpu" else f"{kind}{version}, devices: {torch.accelerator.device_count()}"
    yield Finding("ok", f"torch {torch.__version__}, {found}")
    for requirement in requirements(""):
        if requirement.trouble:
            yield Finding("problem", f"{requirement}: {requirement.trouble}", f"pip install {requirement.quoted}")


def _optional() -> Iterator[Finding]:
    for extra in sorted(metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []):
        wrong = [requirement for requirement in requirements(extra) if requirement.trouble]
        yield _extra(extra, wrong)


def _extra(extra: str, wrong: list[Requirement]) -> Finding:
    if not wrong:
        return Finding("ok", f"extra {extra!r}: everything it needs is installed")
    outdated = [requirement for requirement in wrong if requirement.installed]
    listed = ", ".join(f"{requirement} ({requirement.trouble})" for requirement in outdated or wrong)
    advice = f"pip install 'lora-plugins[{extra}]'"
    if outdated:
        return Finding("problem", f"extra {extra!r}: {listed}", advice)
    return Finding("note", f"extra {extra!r} is not complete: {listed}", f"If you want it: {advice}")


def _plugins() -> Iterator[Finding]:
    points = metadata.distribution(DISTRIBUTION).entry_points
    own = {point.name for point in points.select(group=GROUP)}
    missing = sorted({kind.name for kind in KINDS} - own)
    if not points.select(group=COMMANDS):
        missing.append(COMMANDS)
    if missing:
        yield Finding(
            "problem",
            f"lora-plugins itself lacks the entry points {listing(missing)}",
            "Its metadata are stale. Install it again: pip install --force-reinstall --no-deps lora-plugins",
        )
    try:
        registry = default_registry()
    except PluginError as error:
        yield _no_registry(error)
        return
    for info in registry.plugins:
        yield _plugin(info)
    for problem in installed_commands().problems:
        yield Finding("problem", problem, "Repair or uninstall that distribution.")
    yield from _misspelt_groups()
    installed = [name for info in registry.plugins for name in (info.name, info.full_name)]
    for variable in (BLOCK_VARIABLE, ALLOW_VARIABLE):
        for name in names_in(variable):
            if name not in installed:
                yield Finding("note", f"{variable} names {name!r}, which is not installed", near(name, installed))


def _misspelt_groups() -> Iterator[Finding]:
    """Names entry points in groups that are called nearly as ours: no one looks there, and nothing says so."""
    points = metadata.entry_points()
    for group in sorted(points.groups - {GROUP, COMMANDS}):
        # Closer than what `near` offers, which would take groups of others for ours.
        for meant in difflib.get_close_matches(group, [GROUP, COMMANDS], n=1, cutoff=0.85):
            for point in points.select(group=group):
                of = f" of {point.dist.name}" if point.dist else ""
                found = f"the entry point {point.name!r}{of} is in the group {group!r}, which is not ours"
                yield Finding("note", found, f"If it is a plugin, call the group {meant!r} and install it again.")


def _no_registry(error: PluginError) -> Finding:
    cause = error.__cause__
    if cause is None:  # two plugins that claim one name
        return Finding("problem", str(error), "What can be done is said above; until then nothing can be adapted.")
    advice = f"Repair that file, or correct {LOAD_VARIABLE}, which names it; until then nothing can be adapted."
    return Finding("problem", f"{error}{_where(cause)}", advice)


def _where(error: BaseException) -> str:
    """Says where a plugin failed; nothing where that is no line of it, as of an error that says all itself."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    if isinstance(error, LoraError) or frame.filename.startswith("<frozen"):
        return ""
    return f" ({frame.filename}, line {frame.lineno})"


def _plugin(info: PluginInfo) -> Finding:
    if info.error is not None:
        return Finding(
            "problem",
            f"plugin {info.owner} {' '.join(info.state.split())}{_where(info.error)}",
            f"Repair or uninstall {info.distribution}, or leave it out: {BLOCK_VARIABLE}={info.name}",
        )
    provides = ", ".join(name for _, name in info.provides) or "nothing"
    if info.blocked or info.notes:
        return Finding("note", f"plugin {info.owner}: {info.state}")
    return Finding("ok", f"plugin {info.owner}: provides {provides}")


def _kernels() -> Iterator[Finding]:
    try:
        report = kernel_report()
    except ConfigError as error:
        yield Finding("problem", str(error), f"Correct {DISABLE_VARIABLE}; until then no adapted layer computes.")
        return
    for kernel in report:
        used = "yes" if kernel.used else f"no, because {kernel.reason}"
        mark: Literal["ok", "note"] = "ok" if kernel.used else "note"
        yield Finding(mark, f"kernel {kernel.name} ({', '.join(kernel.operations)}), used here: {used}")


def _lightning_command() -> Iterator[Finding]:
    points = metadata.entry_points(group="console_scripts", name="lightning")
    owners = sorted({point.dist.name for point in points if point.dist} - {DISTRIBUTION})
    others = ", ".join(owners)
    way_out = "`lora-plugins` and `python -m lora_plugins` always work."
    path = shutil.which("lightning")
    if path is None:
        yield Finding("note", "there is no command `lightning` on the PATH", f"Activate the environment, or: {way_out}")
    elif not _is_ours(Path(path)):
        yield Finding(
            "note",
            f"the command `lightning` ({path}) is not ours{f', but that of {others}' if others else ''}",
            f"{way_out} To have it back: pip install --force-reinstall --no-deps lora-plugins",
        )
    else:
        more = f"; other commands of that name are handed to {others}" if others else ""
        yield Finding("ok", f"the command `lightning` ({path}) is ours{more}")


def _is_ours(program: Path) -> bool:
    try:
        return OUR_MAIN.encode() in program.read_bytes()
    except OSError:  # a script, as ours is, runs only where it can be read
        return False


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Installation": _installation,
    "Optional packages": _optional,
    "Plugins": _plugins,
    "Kernels": _kernels,
    "The command `lightning`": _lightning_command,
}
"""What is looked at, in order."""
