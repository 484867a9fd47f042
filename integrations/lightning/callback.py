"""`LoraCallback`: LoRA over any LightningModule."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import Optimizer

from lora_plugins import ConfigError, LoraConfig, LoraModel, Plan
from lora_plugins.adapter import freeze_new_norms, model_state, present_state
from lora_plugins.arguments import check_config
from lora_plugins.field_checks import (
    Check,
    check_count,
    check_fields,
    check_flag,
    check_name,
    check_share,
    choice_of,
    optional,
)
from lora_plugins.inplace import full_name, model_modules, submodule
from lora_plugins.integrations.lightning.adapter_files import (
    AdapterFile,
    adapter_files,
    check_distinct,
    check_expressible,
    check_places,
    check_room,
)
from lora_plugins.integrations.lightning.checkpoint import loading_lines
from lora_plugins.integrations.lightning.class_paths import allow_class_path
from lora_plugins.integrations.lightning.console import print_plan, tell_written
from lora_plugins.integrations.lightning.module import (
    KeptMerge,
    Start,
    add_adapter,
    add_names,
    check_mergeable,
    check_merged_base,
    check_not_nested,
    check_not_replaced,
    checked_state_dict,
    find_target,
    freeze_alike,
    frozen_by_others,
    known_bases,
    merge_as_bytes,
    merge_from_bytes,
    merge_reversibly,
    merged_weights,
    modes_of_frozen_norms,
    reuse_adapter,
    set_modes_of_frozen_norms,
    set_training_mode,
    warn_of_others,
    with_built_layers,
    with_declarations,
)
from lora_plugins.integrations.lightning.results import Results, best_checkpoint, explaining_merges, load_best
from lora_plugins.integrations.lightning.run import Run
from lora_plugins.integrations.lightning.sharded_run import ShardedRun
from lora_plugins.integrations.lightning.shared_options import check_shared
from lora_plugins.integrations.lightning.shims import (
    MethodShims,
    begin_run,
    callbacks_of,
    carried,
    carry,
    end_run,
    expecting_eval_mode,
    is_fast_dev_run,
    starts_by_multiprocessing,
)
from lora_plugins.integrations.lightning.strategies import (
    CheckpointShims,
    check_callbacks,
    check_not_wrapped,
    check_strategy,
    check_trainer,
    is_sharded,
    warn_if_spawned,
)
from lora_plugins.integrations.lightning.training import (
    LateChanges,
    LearningRates,
    ResumedState,
    adapt_after_restoring,
    calibrate_on_train_batches,
    check_averages,
    check_backbone,
    check_trained,
    complete_optimizers,
    copy_into_averages,
    drop_averages,
    freeze_again,
    frozen_names,
    needs_data,
    random_numbers,
    retry_without_factors,
    start_averages_from,
    stores_changed_base,
)
from lora_plugins.integrations.lightning.writer import check_by_writer, writes_files
from lora_plugins.merge import DEFAULT_MAX_ERROR
from lora_plugins.names import DEFAULT_ADAPTER
from lora_plugins.writable import from_home

allow_class_path()


def _check_export(name: str, value: Any) -> None:
    if not isinstance(value, str | Path) or Path(value).suffix != ".safetensors":
        raise ConfigError(f"{name} is {value!r}. It names a file that ends in .safetensors.")


_CHECKS: Mapping[str, Check] = {
    "adapter_name": check_name,
    "merge_on_fit_end": check_flag,
    "dequantize": check_flag,
    "merge_source": choice_of("last", "best"),
    "target": optional(check_name),
    "train_mode": check_flag,
    "print_plan": check_flag,
    "max_error": check_share,
    "init_batches": check_count,
}
"""What the arguments of a LoraCallback can be, by name."""


class LoraCallback(Callback):
    """Adapts a LightningModule with LoRA while it is fitted; the module needs no change.

    At the start of `fit` the module's layers are adapted in place and everything else is frozen, before optimizers are
    made. Every checkpoint of the run holds what is trained and leaves the frozen base out, on every path on which
    Lightning saves one; `trainer.fit`, `validate`, `test` and `predict` take such a file as `ckpt_path`. When `fit`
    ends, the adapter is merged and the module has its own classes and state-dict keys again. A later `fit` with
    the same callback undoes the merge, bit for bit, and goes on with the adapter, if the module still has the merged
    values.

    A module may declare `head_modules`, the names of modules with newly initialized parameters. They are trained as if
    `modules_to_save` listed them. What its method `file_entries(target)` returns, JSON by name, is written into the
    adapter folder and the exported file.

    Args:
        config: What is adapted, and how.
        adapter_name: Name of the adapter. LoraCallbacks with one target have a name each.
        merge_on_fit_end: Whether the adapter is merged into the module when `fit` ends.
        dequantize: Whether a merged or exported model has dense weights where the config stores those of the base in
            fewer bytes (`quantize`), which cannot hold a merged update.
        merge_source: Which weights the module has after `fit`, and are saved: the `last` ones, or those of the `best`
            checkpoint, as the trainer's ModelCheckpoint with a `monitor` has it.
        target: Name of the submodule to adapt, such as `network`; by default the whole LightningModule. Names in the
            config, the adapter folder and the exported file are relative to it.
        save_adapter_to: Folder for the adapter, written when `fit` ends, or a file in another format:
            `AdapterFile("runs/for_peft", format="peft")`; or a list of such folders and files.
        export_to: A `.safetensors` file for the target's plain state dict with the adapter merged, written when `fit`
            ends. It loads with `strict=True` into the untouched architecture, without lora_plugins. Like the adapter,
            it is not written in a `fast_dev_run`.
        train_mode: Whether `fit` puts the target into training mode, except for frozen normalization layers and for
            what its author froze and put into eval mode, such as a teacher. Models of `from_pretrained` arrive in eval
            mode, and Lightning does not change that.
        print_plan: Whether a table of what is adapted is printed before training.
        loraplus_lr_ratio: Learning rate of every B, as a multiple of that of A (LoRA+). A has the optimizer's own
            rate, and so has what a variant adds. Parameter groups are split for that, and the parts follow the rate of
            their group, whoever sets it. All LoraCallbacks of a trainer have the same ratios.
        heads_lr_ratio: Learning rate of what is trained in full, heads and biases, as a multiple of that of A.
        max_error: Share of an update that a merge may lose to rounding, as in `LoraModel.merge_adapter`.
        init_batches: How many training batches an init that learns from data, such as `eva`, sees, at most.

    Raises:
        ConfigError: If an argument is invalid.
    """

    def __init__(
        self,
        config: LoraConfig,
        *,
        adapter_name: str = DEFAULT_ADAPTER,
        merge_on_fit_end: bool = True,
        dequantize: bool = False,
        merge_source: Literal["last", "best"] = "last",
        target: str | None = None,
        save_adapter_to: AdapterFile | str | Path | list[str | Path | AdapterFile] | None = None,
        export_to: str | Path | None = None,
        train_mode: bool = True,
        print_plan: bool = True,
        loraplus_lr_ratio: float = 1.0,
        heads_lr_ratio: float = 1.0,
        max_error: float = DEFAULT_MAX_ERROR,
        init_batches: int = 32,
    ) -> None:
        check_config("LoraCallback", config)
        optional(_check_export)("export_to", export_to)
        self.config = config
        self.adapter_name = adapter_name
        self.merge_on_fit_end = merge_on_fit_end
        self.dequantize = dequantize
        self.merge_source = merge_source
        self.target = target
        self.save_adapter_to = save_adapter_to
        self.adapter_files = adapter_files(save_adapter_to)
        self.export_to = None if export_to is None else from_home(export_to)
        self.train_mode = train_mode
        self.print_plan = print_plan
        self.rates = LearningRates(loraplus_lr_ratio, heads_lr_ratio)
        self.max_error = max_error
        self.init_batches = init_batches
        check_fields(vars(self), _CHECKS)
        self._merge = KeptMerge(adapter_name)
        self._modes: dict[str, bool] = {}
        self._start = Start()
        self._names: list[tuple[set[str], set[str]]] = []
        self._run = Run()

    @property
    def state_key(self) -> str:
        """Distinguishes this callback's state from that of another LoraCallback."""
        key = {"target": self.target, "adapter": self.adapter_name}
        return f"{type(self).__qualname__}{key}"

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of torch's random numbers, and the ratios of learning rates.

        With the former, shuffling and dropout go on as they would have; parameter groups and the state of their
        optimizer depend on the latter. The adapter itself is in the checkpoint's entry `lora_plugins`.
        """
        return {**random_numbers(), "rates": vars(self.rates)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Stores the state until training starts."""
        self._run.resumed = ResumedState(state_dict)

    def plan(self, module: LightningModule) -> Plan:
        """Returns what would be adapted, and changes nothing.

        A module that overrides `setup` or `configure_model`, where layers may be built, is copied, and they are called
        on the copy.

        Raises:
            TargetError: If the configuration does not fit the module.
        """
        module = with_built_layers(module)
        target = self._target(module)
        return LoraModel.plan(target, with_declarations(self.config, module, target, self.target))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Installs the shims by which the module is adapted, saved and loaded.

        Raises:
            StateError: If the trainer is set up in a way in which the adapter would be lost.
        """
        self._end_run(trainer)
        begin_run(trainer, stage)
        self._modes = modes_of_frozen_norms(pl_module)
        self._check_trainer(trainer, stage)
        CheckpointShims.install(trainer, self)
        shims = MethodShims(pl_module)
        self._run.shims.append(shims)
        self._run.follow_building(shims, pl_module)
        if not self._merge.is_kept and (data := carried(trainer, self.state_key)) is not None:
            self._merge.keep(merge_from_bytes(data, self._target(pl_module)))
        if self._run.adapts_in(stage):
            self._install_shims(shims, trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints what is adapted.

        Raises:
            StateError: If something replaced adapted layers after they were adapted, or they cannot be merged later.
        """
        self.rates.check_restored(self._run.resumed.rates)
        target = self._target(pl_module)
        check_not_wrapped(target)
        check_not_replaced(target, self.adapter_name)
        if (group := self._group(trainer))[0] is self:
            warn_of_others(target, {callback.adapter_name for callback in group})
        freeze_new_norms(target)  # those that Trainer(sync_batchnorm=True) has made
        check_backbone(trainer, pl_module)
        self._check_mergeable(trainer, target)
        if self.export_to is not None:
            checked_state_dict(target)
        check_expressible(self.adapter_files, target, self.adapter_name)
        plan = LoraModel(target).plans[self.adapter_name]
        check_by_writer(trainer, lambda: check_room(self.adapter_files, self.export_to, plan))
        self._run.left_out = left_out = self._run.find_left_out(pl_module, self.target, plan)
        if self.print_plan and trainer.is_global_zero:
            print_plan(plan, f"LoRA adapter {self.adapter_name!r}", left_out.layers)
        left_out.tell_layers(target)
        if self._is_first(trainer):
            self._run.expected_warnings.enter_context(expecting_eval_mode(pl_module))
        self._run.resumed.set_before_data(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks averages before validation, in which callbacks exchange them with the module.

        Raises:
            StateError: If another callback made its average before there were adapters.
        """
        check_averages(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets warnings about modules in eval mode pass again.

        Raises:
            StateError: If another callback made its average before there were adapters.
        """
        check_averages(trainer, pl_module)
        self._run.resumed.note_after_data(trainer)
        self._run.expected_warnings.close()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the random numbers of a checkpoint again, if the first epoch is about to draw its batches anew.

        It does so where Lightning first runs what is left of the epoch of the file, which is nothing after its end.
        """
        loop = trainer.fit_loop
        if not (loop.epoch_loop.restarting or loop.is_resuming):
            self._run.resumed.set(trainer)
        self._run.resumed.forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts the audit, after all hooks of the module in which it may load a teacher."""
        self._run.before_batch(trainer, pl_module, batch_idx, self._start)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drops gradients of what the step has made trainable of the base, before it may clip those of all.

        Raises:
            StateError: If an optimizer trains the base.
        """
        self._run.freeze_base()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Notes in the first steps what has a gradient."""
        if self._run.audit is not None:
            self._run.audit.before_step(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks in the first steps that everything trainable gets a gradient and changes.

        Raises:
            StateError: If nothing does.
        """
        if self._run.audit is not None:
            self._run.audit.after_batch(outputs)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks copies before validation, in which callbacks exchange the whole module.

        Raises:
            StateError: If one was moved that does not follow the adapter of its origin.
        """
        self._run.keep_base(trainer, pl_module)
        if self._run.audit is not None:
            self._run.audit.before_validation()  # last, as it ignores what is changed from now on

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps the frozen base exact in averages of the module."""
        self._run.keep_base(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the frozen base has not changed.

        Raises:
            StateError: If it has.
        """
        self._run.keep_base(trainer, pl_module)
        if self._run.audit is not None:
            self._run.sums = self._run.audit.finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves, merges and exports, as the options say.

        Raises:
            StateError: If not one batch was trained on, and no limit of the trainer asks for that.
        """
        check_trained(trainer)
        set_modes_of_frozen_norms(pl_module, self._modes)
        if self.merge_source == "best" and self._is_first(trainer):  # later, it would undo merges
            load_best(trainer, pl_module)
        if self.merge_on_fit_end:
            drop_averages(trainer, pl_module)
        elif self.merge_source == "best":
            start_averages_from(trainer, pl_module)
        group = self._group(trainer)
        is_last_of_target = group[-1] is self
        is_trial = is_fast_dev_run(trainer)
        leaves_files = bool(places_of_results(trainer)) and not is_trial
        must_stay = self._run.held(pl_module, self.target or "", leaves_files) if is_last_of_target else {}
        callbacks_so_far = [] if is_trial else group[: group.index(self) + 1]  # those behind write their files later
        with explaining_merges([file for callback in callbacks_so_far for file in callback.adapter_files]):
            files = {} if is_trial else self._results().write(trainer, pl_module, self._run.written)
            is_first = self._is_first(trainer)  # later, networks that the line names are merged
            lines = loading_lines(trainer, pl_module) if is_first and writes_files(trainer) else []
            if self.merge_on_fit_end and is_last_of_target:  # the others have written their files
                self._merge_adapters(trainer, pl_module)
        self._run.late_changes = LateChanges(must_stay)
        if writes_files(trainer):
            tell_written(trainer, files, lines)

    def on_init_end(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses the Trainer of transformers, which calls this when it is made; Lightning's has no such hook.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "This LoraCallback is for the Trainer of Lightning, and was given to that of transformers. There it is "
            "LoraTrainer(model, args, ..., lora_config=config) of lora_plugins.integrations.transformers, in place of "
            "Trainer; for another class of trainers, `class Mine(LoraTrainer, Seq2SeqTrainer): pass`."
        )

    def on_after_setup(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses Fabric, which calls this when it sets up a model and adapts nothing; the Trainer has no such hook.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            "This LoraCallback is for the Trainer of Lightning, and was given to Fabric, where nothing would be "
            "adapted. There, call LoraModel(model, config) before fabric.setup(model, optimizer)."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restores the module's own methods; the trainer can still save its checkpoints."""
        self._run.explain(trainer, exception, merged=self.merge_on_fit_end)
        self._end_run(trainer)
        end_run(trainer, "fit")  # a run inside of it ends it as well

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the methods of the module, and those of the strategy if the module carries no adapter.

        A merge that was undone to read a checkpoint is made again, with the adapter of that checkpoint.
        """
        set_modes_of_frozen_norms(pl_module, self._modes)
        if self._run.late_changes is not None:
            self._run.late_changes.tell()
        if stage != "fit" and self._merge.undone:
            self._merge.make_again(self._target(pl_module), self.max_error, dequantize=self.dequantize)
        self._end_run(trainer)
        CheckpointShims.remove(trainer, pl_module)
        end_run(trainer, stage)

    def undo_merge(self, module: nn.Module) -> bool:
        """Undoes the merge if `module` still has the merged values, since an adapter is about to be loaded.

        Elsewhere the weights that are there win, and a line says so if it is the module that was merged.

        Returns:
            Whether a merge was undone.
        """
        return self._merge.is_kept and self._merge.undo(self._target(module), type(module).__name__)

    def awaited(self, module: LightningModule) -> dict[tuple[str, str], LoraConfig]:
        """Returns the adapter that waits for a checkpoint, by target and name; empty if there is none."""
        if not self._run.waits:
            return {}
        target = self._target(module)
        if (state := model_state(target)) is not None and self.adapter_name in state.adapters:
            return {}
        config = with_declarations(self.config, module, target, self.target)
        path = next(entry.name for entry in model_modules(module) if entry.module is target)  # target may be another
        return {(path, self.adapter_name): config}

    def before_save(self, trainer: Trainer) -> None:
        """Records what the module has changed by hand, which the checkpoint has to hold; averages have the base."""
        if self._run.audit is not None:
            self._run.note_moved()
            self._run.keep_base(trainer, trainer.lightning_module)

    def restored(self, trainer: Trainer, changed: bool, whole: bool) -> None:
        """Records the module with the adapters of a checkpoint; averages copy it before their own state is loaded."""
        module = trainer.lightning_module
        self._modes = modes_of_frozen_norms(module)
        if trainer.state.fn == "fit":
            self._run.known_bases = known_bases(module)
            if not whole:  # else the base becomes again what it was
                self._start = Start.of(module)
        if changed:
            copy_into_averages(trainer, module)

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without what belongs to a run."""
        return {**self.__dict__, "_merge": KeptMerge(self.adapter_name), "_run": Run()}

    def _check_trainer(self, trainer: Trainer, stage: str) -> None:
        """Checks that a trainer can do what this callback is to do with it."""
        check_trainer(trainer)
        check_strategy(trainer, vars(self))
        if stage == "fit":
            check_callbacks(trainer)
            check_distinct(places_of_results(trainer))
            check_by_writer(trainer, lambda: check_places(self.adapter_files, self.export_to))
            if self.merge_source == "best":
                best_checkpoint(trainer)
            if not self.merge_on_fit_end:
                warn_if_spawned(trainer)
        every, group = lora_callbacks(trainer), self._group(trainer)
        merging = ["merge_on_fit_end", *(["max_error"] if self.merge_on_fit_end else [])]
        check_shared(merging, group, "with one target are merged together")
        check_shared(["train_mode"], group, "with one target leave it in one mode")
        check_shared(["merge_source"], every, "of one trainer leave one module with the weights of one moment")
        check_shared(vars(self.rates), every, "of one trainer share its optimizers")

    def _install_shims(self, shims: MethodShims, trainer: Trainer, module: LightningModule) -> None:
        """Lets the module be adapted once it is built, and the run act where no hook of a callback is the last one."""
        every = lora_callbacks(trainer)
        self._run.waits = self._waits_for_checkpoint(trainer)
        # One that another callback has added since may be the first, as those before it do not wait.
        if self._run.waits and not any(each._run.waits for each in every[: every.index(self)]):
            adapt = partial(self._adapt_in_order, trainer, module)
            self._run.shims.append(adapt_after_restoring(trainer, adapt))
        elif not self._run.waits:
            adapt = partial(self._ensure_adapted, trainer, module)
            self._run.adapt_when_built(shims, module, self.target, self.adapter_name, adapt)
        if self._is_first(trainer):  # below the shims of the others, each of which would multiply the attempts
            shims.around("configure_optimizers", partial(retry_without_factors, module))
        shims.after(
            "configure_optimizers",
            lambda configured: self._complete_optimizers(module, configured),
            lambda: self._before_optimizers(trainer, module),
        )
        # The last hooks before batches are drawn: those of all callbacks, and the module's own, may draw as well.
        shims.after("on_fit_start", lambda _: self._run.resumed.set_before_data(trainer))
        shims.after("on_fit_start", lambda _: self._run.left_out.tell_copies(module))
        shims.after("on_train_start", lambda _: self._run.resumed.set_after_data())
        # After all hooks in which gradients are switched: the module's own comes after those of the callbacks.
        shims.after("on_train_batch_start", lambda _: self._run.freeze_base())
        # The last hook before a step: after those of all callbacks, any of which may set rates.
        shims.after("on_before_optimizer_step", lambda _: self.rates.follow_all(trainer.optimizers))

    def _before_optimizers(self, trainer: Trainer, module: LightningModule) -> None:
        self._run.resumed.set(trainer)
        self._run.frozen = frozen_names(module)
        if self._run.audit is None:  # else they are made anew in training, whose first steps nobody watches again
            self._run.lost_writes.start(module)

    def _complete_optimizers(self, module: LightningModule, configured: Any) -> None:
        """Adds what is to be trained to the optimizers, each part at its learning rate, and keeps the base frozen."""
        freeze_again(module, self._run.frozen)
        complete_optimizers(module, configured)
        self.rates.split_groups(module, configured)

    def _is_first(self, trainer: Trainer) -> bool:
        """Whether what several LoraCallbacks do together is for this one to do."""
        return lora_callbacks(trainer)[0] is self

    def _waits_for_checkpoint(self, trainer: Trainer) -> bool:
        """Whether the adapter joins after a checkpoint: all do if one does, as each needs what those before it left."""
        configs = [callback.config for callback in lora_callbacks(trainer)]
        stores = not is_sharded(trainer) and any(map(stores_changed_base, configs))
        return stores or any(map(needs_data, configs))

    def _adapt_in_order(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in lora_callbacks(trainer):
            callback._ensure_adapted(trainer, module)

    def _ensure_adapted(self, trainer: Trainer, module: LightningModule) -> None:
        """Adapts the module if it is not adapted; called wherever its structure may have changed."""
        group = self._group(trainer)
        undone = [callback.undo_merge(module) for callback in group]
        target = self._target(module)
        state = model_state(target)
        config = with_declarations(self.config, module, target, self.target)
        if state is not None and self.adapter_name in state.adapters:
            reuse_adapter(target, self.adapter_name, config)
            if any(undone):
                copy_into_averages(trainer, module)
        else:
            self._add_adapter(trainer, module, config)
        copies = self._run.copies(module)
        freeze_alike(module, copies)  # before what is frozen is noted: a copy that is resumed differs from its origin
        self._run.teachers = {*frozen_by_others(module)}
        self._names += add_names(module, copies)
        if self.train_mode and trainer.state.fn == "fit":
            averages = [copy.name for copy in copies if copy.equal and not copy.shares]
            set_training_mode(target, [submodule(module, name) for name in averages])
        self._modes = modes_of_frozen_norms(module)
        self._start = self._run.note_adapted(module)

    def _add_adapter(self, trainer: Trainer, module: LightningModule, config: LoraConfig) -> None:
        """Adds the adapter to a module that has none of its name."""
        target = self._target(module)
        check_not_nested(module, self.target)
        self._run.check_addable(trainer, target, config)
        self._check_mergeable(trainer, target, config)
        if merged := merged_weights(target):
            check_merged_base(merged, type(module).__name__, self._files_of_the_adapter(target, config))
        data = None
        if needs_data(config):
            data = calibrate_on_train_batches(trainer, module, self.target, config, self.init_batches)
        add_adapter(target, self.adapter_name, config, data)
        self._run.start_adapter(trainer, module, target, self.adapter_name)
        LoraModel(target).pack(self.adapter_name)  # takes the base's fingerprints, as long as it is whole
        changed = {full_name(self.target or "", name) for name in present_state(target).values.of(self.adapter_name)}
        for callback in lora_callbacks(trainer):  # whose adapters were there before an init that changes the base
            callback._start = callback._start.without(changed)
        copy_into_averages(trainer, module)

    def _merge_adapters(self, trainer: Trainer, module: LightningModule) -> None:
        """Merges all adapters of the target and takes their names back; a process started for the run hands it on."""
        # A debugging run of a few batches is not stopped by what they did not learn.
        max_error = math.inf if is_fast_dev_run(trainer) else self.max_error
        prefix = f"{self.target}." if self.target else ""
        sums = {name.removeprefix(prefix): total for name, total in self._run.sums.items() if name.startswith(prefix)}
        merge = merge_reversibly(self._target(module), max_error, dequantize=self.dequantize, base_sums=sums)
        self._merge.keep(merge)
        if starts_by_multiprocessing(trainer) and not (merge.stored or merge.foreign):
            carry(trainer, self.state_key, merge_as_bytes(merge))
        for callback in self._group(trainer):
            callback._remove_names()

    def _check_mergeable(self, trainer: Trainer, target: nn.Module, planned: LoraConfig | None = None) -> None:
        if trainer.state.fn == "fit" and (self.merge_on_fit_end or self.export_to is not None):
            plan = None if planned is None else LoraModel.plan(target, planned)
            check_mergeable(target, dequantize=self.dequantize, plan=plan)

    def _group(self, trainer: Trainer) -> "list[LoraCallback]":
        """The callbacks with the same target, whose adapters are merged together."""
        return [callback for callback in lora_callbacks(trainer) if callback.target == self.target]

    def _remove_names(self) -> None:
        names, self._names = self._names, []
        for collection, added in names:
            collection.difference_update(added)

    def _files_of_the_adapter(self, target: nn.Module, config: LoraConfig) -> str | None:
        """Returns the option that leaves an adapter which needs the pretrained base, if there is one."""
        if self.adapter_files:
            return f"save_adapter_to={self.save_adapter_to!r}"
        if config.quantize is not None:  # what is stored in fewer bytes is in no checkpoint
            return f"quantize={config.quantize!r}"
        return f"init={self.config.init!r}" if LoraModel.plan(target, config).init.changes_base else None

    def _results(self) -> Results:
        return Results(
            self.adapter_name, self.target or "", self.adapter_files, self.export_to, self.max_error, self.dequantize
        )

    def _target(self, module: nn.Module) -> nn.Module:
        return find_target(module, self.target)

    def _end_run(self, trainer: Trainer) -> None:
        self._run.end()
        self._run = ShardedRun() if is_sharded(trainer) else Run()
        self._merge.undone = False


def lora_callbacks(trainer: Trainer) -> list[LoraCallback]:
    """Returns the LoraCallbacks of a trainer, in their order."""
    return [callback for callback in callbacks_of(trainer) if isinstance(callback, LoraCallback)]


def places_of_results(trainer: Trainer) -> list[str]:
    """Returns where callbacks write: adapters, and the merged model of each target."""
    callbacks = lora_callbacks(trainer)
    merged = {(each.target, each.export_to) for each in callbacks if each.export_to is not None}
    return [file.path for each in callbacks for file in each.adapter_files] + [path for _, path in merged]
