"""What `fit --help` prints: one page; `fit --help-all` prints every flag, which takes LightningCLI seconds."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from textwrap import fill
from typing import Any

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning.cli.recipes import recipes
from lora_plugins.integrations.lightning.cli.short_flags import SHORT

ALL = "--help-all"
"""The flag that asks for LightningCLI's own help."""


def help_page(command: str) -> str:
    """Returns the help of `fit`, `plan`, which takes the same arguments, `validate`, `test` or `predict`."""
    short = "\n".join(f"  {flag:14}{each.meaning:22}{each.stands_for}" for flag, each in SHORT.items())
    return f"""usage: lora-plugins {command} --config FILE [--SECTION.NAME VALUE ...]

A configuration is a YAML file, or recipe:NAME for one that is shipped:
{fill(", ".join(recipes()), 100, initial_indent="  ", subsequent_indent="  ")}.
`lora-plugins recipes` says what each is for, `lora-plugins recipes copy NAME` gives you one to change.

Sections of a configuration; each value is a flag too, and the last one given counts:
  model        class_path and init_args of a LightningModule; those of lora_plugins.tasks are
               ImageClassificationTask, SemanticSegmentationTask and TextToImageTask
  data         class_path and init_args of a LightningDataModule
  trainer      arguments of Lightning's Trainer: max_epochs, precision, devices, accelerator, callbacks, ...
  optimizer, lr_scheduler   class_path and init_args, in the place of the task's own
  lora         {_lora_fields()}
  lora_callback   target, save_adapter_to, export_to, merge_on_fit_end, ...
  seed_everything, ckpt_path

Short flags:
{short}

  {command} --print_config    prints the whole configuration that the arguments make
  {command} {ALL}      lists every flag
"""


def _lora_fields() -> str:
    names = ", ".join(f"{each.name}{_default(each)}" for each in fields(LoraConfig))
    indent = " " * 15
    return fill(names, 106, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False).lstrip()


def _default(field: Field[Any]) -> str:
    simple = field.default is not MISSING and not isinstance(field.default, Mapping | tuple | list | None)
    return f"={field.default}" if simple else ""
