"""`LoraCLI`: LightningCLI with a `lora:` section."""

import os
import re
import sys
from contextlib import ExitStack
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, LRSchedulerTypeUnion
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lora_plugins import ConfigError, LoraConfig, LoraError
from lora_plugins.cli import TERMINATED, without_collections
from lora_plugins.errors import listing
from lora_plugins.integrations.lightning.callback import LoraCallback, lora_callbacks, places_of_results
from lora_plugins.integrations.lightning.checkpoint import written_by
from lora_plugins.integrations.lightning.cli.checkpoint_arguments import CheckpointArguments
from lora_plugins.integrations.lightning.cli.closing import closing_lines
from lora_plugins.integrations.lightning.cli.explained import explained, explained_building
from lora_plugins.integrations.lightning.cli.held_places import held
from lora_plugins.integrations.lightning.cli.interruption import Interruption, sigterm_after_batch
from lora_plugins.integrations.lightning.cli.optimizer_section import OptimizerSection
from lora_plugins.integrations.lightning.cli.short_flags import SHORT
from lora_plugins.integrations.lightning.console import FitConsole, plain_metrics, print_lines, print_plan
from lora_plugins.integrations.lightning.writer import writes_files

_FROM_FILE = "sub_configs" if "sub_configs" in signature(ArgumentParser.add_argument).parameters else "enable_path"
"""The option of jsonargparse that lets a section be the path of a file; called otherwise before 4.49."""

_KEEPING = "To keep what is there, press Ctrl-C twice, and name other places: save_adapter_to, export_to."


class LoraCLI(CheckpointArguments, OptimizerSection, LightningCLI):
    """Runs a Trainer from a YAML file that may have two sections more than Lightning's own.

    `lora:` holds the fields of a `LoraConfig`, inline or as the path of a YAML file with them; with it, a
    `LoraCallback` joins the trainer's callbacks, ahead of them. `lora_callback:` holds the callback's other
    arguments. Without `lora:`, this is LightningCLI. Model and data are named by `class_path`. The optimizer of the
    section `optimizer:` trains what requires a gradient, adapters included.

    Its commands show one line of progress, in place of Lightning's bar and summary of the model, and `fit` says at its
    end where everything is. Ctrl-C ends a fit as if it were over.

    Attributes:
        console: What a command shows.
        interruption: Answers Ctrl-C.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("subclass_mode_model", True)
        kwargs.setdefault("subclass_mode_data", True)
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})  # without a logger, runs share one folder
        self.interruption = Interruption()
        given, commands = kwargs.get("args"), super().subcommands()
        words = given if isinstance(given, list) else sys.argv[1:]
        self._flags = [each for each in words if each.startswith("--") and each.partition("=")[0] != "--config"]
        if isinstance(given, list) and given and given[0] in commands:  # each parser takes time
            self.subcommands = partial(dict, {given[0]: commands[given[0]]})  # type: ignore[method-assign]
        with ExitStack() as self._starting:
            self._starting.enter_context(without_collections())
            super().__init__(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoraCLI":
        """Returns itself: a copy of a module refers to it where the configuration gives classes to call later.

        With it, the trainer would be copied, which cannot be once it has started other processes.
        """
        return self

    def instantiate_classes(self) -> None:
        """Builds trainer, model and data, after which garbage is collected again.

        Raises:
            ConfigError: If a class of Lightning or torch refuses its arguments.
        """
        with explained_building():
            super().instantiate_classes()
        self._starting.close()

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser that says what is wrong with an argument in one message, without all flags."""
        parser = super().init_parser(**kwargs)
        parser.error = partial(_refuse, parser)  # type: ignore[method-assign]
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the two sections."""
        parser.add_argument(
            "--lora",
            type=LoraConfig | None,
            default=None,
            **{_FROM_FILE: True},
            help="How LoRA is applied; null for none. Fields, or the path of a YAML file with them.",
        )
        parser.add_class_arguments(LoraCallback, "lora_callback", skip={"config"}, instantiate=False)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses the arguments, and environment variables where the parser reads them.

        Raises:
            ConfigError: If a variable is one field of the section `lora:`, which jsonargparse would pass over.
        """
        if parser.default_env:
            _check_variables(f"{parser.env_prefix}_" if isinstance(parser.env_prefix, str) else "")
        super().parse_arguments(parser, args)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Builds the trainer, with the callback if there is a `lora:` section, and what a command shows.

        Raises:
            ConfigError: If its callbacks have the adapter of that section too, or an argument is wrong.
        """
        config = self._section("lora")
        if config is not None:
            options = self._section("lora_callback")
            callback = LoraCallback(config, **(options.as_dict() if isinstance(options, Namespace) else options))
            others = self._given_callbacks()
            if callback.state_key in {other.state_key for other in others}:
                raise ConfigError(
                    "There are a `lora:` section and a LoraCallback of the same target and adapter_name among "
                    "trainer.callbacks. Leave one of them out; for a second adapter, give it a name of its own."
                )
            self._section("trainer")["callbacks"] = [callback, *others]
        try:
            return super().instantiate_trainer(**(self._shown() if self.subcommand else {}), **kwargs)
        except LoraError:
            raise
        except (TypeError, ValueError, ImportError) as error:  # Lightning's, about one of its arguments
            raise ConfigError(f"trainer: {' '.join(str(error).split())}") from error

    def before_fit(self) -> None:
        """Says which files that were asked for are not written, since there is no adapter."""
        options = self._section("lora_callback")
        asked = [name for name in ("save_adapter_to", "export_to") if options.get(name)]
        if asked and self._section("lora") is None and self.trainer.is_global_zero:
            print_lines([f"Without a section `lora:`, lora_callback does nothing: {listing(asked)} is not written."])

    def before_validate(self) -> None:
        """Says which weights are measured where no checkpoint is named; results look like those of a bad training."""
        if self._section("lora") is not None and not self._section("ckpt_path") and self.trainer.is_global_zero:
            print_lines(
                [
                    f"Without --ckpt_path, {self.subcommand} takes the model as it is built, without an adapter. "
                    "That is in the checkpoint which fit names at its end."
                ]
            )

    before_test = before_predict = before_validate

    def validate(self, model: LightningModule, **kwargs: Any) -> None:
        """Measures on the validation split."""
        with plain_metrics():
            self.trainer.validate(model, **kwargs)

    def test(self, model: LightningModule, **kwargs: Any) -> None:
        """Measures on the test split."""
        with plain_metrics():
            self.trainer.test(model, **kwargs)

    def fit(self, model: LightningModule, **kwargs: Any) -> None:
        """Fits, handles Ctrl-C, and prints where everything is, and before it which results it will replace.

        Raises:
            ConfigError: If another run is about to write the same results.
            SystemExit: After SIGTERM, with the code of shells; that of Lightning's own says that all went well.
        """
        places = places_of_results(self.trainer) if writes_files(self.trainer) else []
        earlier = [place for place in places if Path(place).exists()]
        if earlier and not kwargs.get("ckpt_path"):
            print_lines([f"{listing(earlier)}: of an earlier run, and replaced when this one ends. {_KEEPING}"])
        with self.interruption.listening(), sigterm_after_batch(self.trainer), held(places):
            try:
                self.trainer.fit(model, **kwargs)
            except SIGTERMException as error:
                saved = written_by(self.trainer.checkpoint_callbacks)
                left = f"Left is {saved[0]}; --ckpt_path goes on from it." if saved else ""
                print(f"Ended by SIGTERM, without results. {left}".strip(), file=sys.stderr)
                raise SystemExit(TERMINATED) from error
            if self.trainer.is_global_zero:
                self.console.take_written(self.trainer)
                configs = [str(path) for path in self._section("config") or []]
                stopped, alone = self.interruption.asked, len(configs) == 1 and not self._flags
                print_lines(closing_lines(self.trainer, model, self.console, configs, stopped=stopped, alone=alone))

    def _shown(self) -> dict[str, Any]:
        """Arguments of the trainer for what a command shows, where the configuration does not say otherwise."""
        section = self._section("trainer")
        callbacks = self._given_callbacks()
        own = section.get("enable_progress_bar") is None and not any(isinstance(c, ProgressBar) for c in callbacks)
        self.console = FitConsole(shows=own)
        # Last, so that what other callbacks say at the end of a stage is said before the line is left.
        shown: dict[str, Any] = {"callbacks": [*callbacks, self.console, self.interruption]}
        if own:
            shown["enable_progress_bar"] = False
        if section.get("enable_model_summary") is None:
            shown["enable_model_summary"] = False
        return shown

    def _given_callbacks(self) -> list[Any]:
        """Returns those of the section `trainer:`, which may hold one or a list."""
        given = self._section("trainer").get("callbacks") or []
        return given if isinstance(given, list) else [given]

    def _section(self, name: str) -> Any:
        """Returns a section of the instantiated configuration, which lies below the subcommand where there is one."""
        config = self.config_init
        return config.get(str(self.subcommand), config).get(name)

    @staticmethod
    def configure_optimizers(
        lightning_module: LightningModule, optimizer: Optimizer, lr_scheduler: LRSchedulerTypeUnion | None = None
    ) -> Any:
        """Gives the optimizer what requires a gradient now: it was built before the module was adapted.

        Its parameter group is changed in place, so that the scheduler goes on driving it.
        """
        trained = [parameter for parameter in lightning_module.parameters() if parameter.requires_grad]
        optimizer.param_groups[0]["params"][:] = trained
        return LightningCLI.configure_optimizers(lightning_module, optimizer, lr_scheduler)


def _refuse(parser: LightningArgumentParser, message: str, *_: Any) -> NoReturn:
    """Raises what is wrong; a function of the module, which processes that are spawned are given with the parser."""
    raise ConfigError(explained(message, [*parser._option_string_actions, *SHORT]))


def _check_variables(prefix: str) -> None:
    """Raises `ConfigError` for variables that name one field of the section, as a run without LoRA would ignore."""
    start = re.escape(prefix.replace("-", "_").upper())
    for name in sorted(os.environ):
        if found := re.fullmatch(rf"({start}(?:[A-Z]+__)?LORA)__(\w+)", name):
            section, field = found[1], found[2].lower().replace("__", ".")
            first, _, inner = field.partition(".")
            value = f"{{{inner}: {os.environ[name]}}}" if inner else os.environ[name]
            raise ConfigError(
                f"The environment variable {name} is not read: a variable holds the whole section `lora:`, as "
                f"{section}='{{{first}: {value}, ...}}', or the path of a YAML file with it. "
                f"Or give the flag --lora.{field}."
            )


class PlanCLI(LoraCLI):
    """Prints what `fit` would adapt with the same arguments, and trains nothing."""

    def fit(self, model: LightningModule, **_: Any) -> None:
        """Replaces `Trainer.fit`.

        Raises:
            TargetError: If the configuration does not fit the model.
            ConfigError: If nothing is to be adapted.
        """
        callbacks = lora_callbacks(self.trainer)
        if not callbacks:
            raise ConfigError("There is nothing to plan: no `lora:` section and no LoraCallback among the callbacks.")
        for callback in callbacks:
            print_plan(callback.plan(model), f"LoRA adapter {callback.adapter_name!r}, not trained yet")
