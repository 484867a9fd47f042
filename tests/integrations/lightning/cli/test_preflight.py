"""Mistakes in arguments: each is one message, said before Lightning is imported where that is possible."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields

import pytest
from lightning.pytorch import Callback
from torch import nn

from lora_plugins import LoraError
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import AdapterFile
from lora_plugins.integrations.lightning.cli.explained import explained
from lora_plugins.plugins import LOAD_VARIABLE
from lora_plugins.testing.full_disk import no_file_beyond
from tests.integrations.lightning.cli.cli_cases import needs_vision
from tests.integrations.lightning.toys import Data

OF_THE_RECIPE = {
    "class": ("--model.class_path lora_plugins.tasks.Clasification", "Classification"),
    "rank": ("--lora.r 1.5", "lora: r is a rank, a whole number from 1 to 65536, not 1.5"),
    "no variant": ("--lora.variant null", "lora: variant holds None, which is not a name."),
    "alpha": ("--lora.alpha eight", "alpha is a positive, finite number, not 'eight'"),
    "init": ("--lora.init kaimin", "There is no init 'kaimin'. Did you mean 'kaiming'?"),
    "option of the init": (
        "--lora.init=loftq --lora.init_options.bit=4",
        "init_options: 'loftq' has no option 'bit'. Did you mean 'bits'?",
    ),
    "value of an option": ("--lora.init=loftq --lora.init_options.bits=9", "bits, not 9."),
    "variant": ("--lora.variant dorra", "no variant 'dorra'. Did you mean 'dora'?"),
    "storage": ("--lora.quantize nf5", "no storage 'nf5'. Did you mean 'nf4'?"),
    "option of the storage": (
        "--lora.quantize=nf4 --lora.quantize_options.block_sise=64",
        "quantize_options: 'nf4' has no option 'block_sise'. Did you mean 'block_size'?",
    ),
    "field": ("--lora.dropot 0.1", "Did you mean 'dropout'"),
    "trainer": ("--trainer.max_epochz 3", "Did you mean 'max_epochs'"),
    "no value": ("--lora.r", "--lora.r takes a value: --lora.r VALUE."),
    "two values": ("--lora.target_modules a b", "'b' has no flag before it."),
    "other section": ("--lora.export_to x", "has: lora_callback.export_to."),
    "no section": ("--lora_callback.config.r 8", "lora_callback has no field 'config'."),
    "flag": ("--epoch 3", "There is no flag --epoch. Did you mean '--epochs'"),
    "section": ("--tainer.max_epochs 3", "Did you mean '--trainer'"),
    "batch size 0": ("--batch-size 0", "--batch-size: '0' is not a whole number of at least 1."),
    "batch size -4": ("--batch-size -4", "--batch-size: '-4' is not a whole number of at least 1."),
    **{
        f"no {limit}": (f"--trainer.{limit} 0", f"trainer.{limit} is 0, and fit would train nothing")
        for limit in ("max_epochs", "max_steps", "limit_train_batches")
    },
    "steps of no batch": (
        "--trainer.accumulate_grad_batches 0",
        "trainer.accumulate_grad_batches is 0, and a step is of 1 batch or more",
    ),
    "no checkpoint": ("--ckpt_path {folder}/lost.ckpt", "no file {folder}/lost.ckpt"),
    **{
        f"{flag} of a variable that is not set": (
            f"{flag} ",
            f"{flag} is empty, perhaps from a shell variable that is not set.",
        )
        for flag in ("--ckpt_path", "--config")
    },
    "best checkpoint": (
        "--ckpt_path best",
        "Name its file, which fit prints at its end, or write 'last' for that of a ModelCheckpoint with save_last and "
        "a dirpath",
    ),
    "near checkpoint": ("--ckpt_path {folder}/lst.ckpt", "Did you mean 'last.ckpt'"),
    "batch size of the file": ("--data.init_args.batch_size 0", "batch_size is 0; it is a whole number"),
    "seed": ("--seed_everything x", "seed_everything is 'x'; it is a whole"),
    "negative seed": ("--seed_everything -1", "seed_everything is -1; it is a whole"),
    "epochs": ("--epochs=0", "--epochs: '0' is not a whole number of at least 1."),
    "rate": ("--lr -1", "--lr: '-1' is not a number above 0."),
    "field of the callback": (
        "--lora_callback.save_adapter x",
        "lora_callback has no field 'save_adapter'. Did you mean 'save_adapter_to'",
    ),
    "adapter in a file": (
        "--lora_callback.save_adapter_to {folder}/a.jpg",
        "save_adapter_to is {folder}/a.jpg, which is a file. Name a folder.",
    ),
    "adapter below a file": (
        "--lora_callback.save_adapter_to {folder}/a.jpg/b/c",
        "{folder}/a.jpg is a file. Name another place.",
    ),
    "adapter where none can be": ("--lora_callback.save_adapter_to /proc/adapter", "nothing can be written in /proc"),
    "field of a file": (
        '--lora_callback.save_adapter_to={{"path":"x","fromat":"peft"}}',
        "save_adapter_to: a file has no 'fromat'. Did you mean 'format'",
    ),
    "field of a file in a list": (
        '--lora_callback.save_adapter_to=[{{"path":"x","fromat":"peft"}}]',
        "save_adapter_to: a file has no 'fromat'. Did you mean 'format'",
    ),
    "file without a path": (
        '--lora_callback.save_adapter_to={{"format":"peft"}}',
        "save_adapter_to is {{'format': 'peft'}}; it has no 'path'",
    ),
    "export into a folder": (
        "--lora_callback.export_to {folder}",
        "export_to is {folder}, which is a folder. Name a file.",
    ),
    "export over the model": (
        "--lora_callback.export_to={folder}/base.safetensors --model.init_args.model.weights={folder}/base.safetensors",
        "which the model is read from",
    ),
    "root folder": (
        "--trainer.default_root_dir {folder}/run.yaml",
        "default_root_dir is {folder}/run.yaml, which is a file",
    ),
    "a folder as checkpoint": ("--ckpt_path {folder}/images", "images is a folder without"),
    "a picture": ("--ckpt_path {folder}/a.jpg", "a.jpg is not a checkpoint"),
}
"""Flags beside `--config recipe:cls`, and what is said of them at once."""

AT_ONCE = {
    "no such file": (["--config", "nowhere.yaml"], "There is no file nowhere.yaml"),
    "near file": (["--config", "{folder}/rn.yaml"], "Did you mean 'run.yaml'"),
    "not YAML": (["--config", "{folder}/broken.yaml"], "broken.yaml is not YAML"),
    "a folder": (["--config", "{folder}"], "--config is {folder}, which is a folder. Name a YAML file."),
    "a section that is a list": (["--config", "{folder}/list.yaml"], "trainer is [1, 2]; it holds keys with values."),
    "no recipe": (["--config", "recipe:segg"], "no recipe 'segg'. Did you mean 'seg'"),
    "no root": (["--config", "recipe:cls_folder", "--data.init_args.root", "{folder}/dta"], "no folder {folder}/dta"),
    "no root, without init_args": (
        ["--config", "recipe:cls_folder", "--data.root", "{folder}/dta"],
        "no folder {folder}/dta",
    ),
    "near root": (["--config", "recipe:cls_folder", "--data.init_args.root={folder}/imges/x"], "Did you mean 'images'"),
    "no flag": (["recipe:cls"], "A configuration is given by --config recipe:cls."),
    "a key twice": (["--config", "{folder}/twice.yaml"], "the key 'r' comes twice in one table in line 1, column 24"),
    "a section twice": (["--config", "{folder}/sections.yaml"], "the key 'lora' comes twice in one table in line 3"),
    "nothing": ([], "the configuration has no `model:`, and needs it."),
    "rate beside a section optimizer": (
        ["--config", "recipe:dreambooth", "--lr", "0.1"],
        "--model.init_args.lr (--lr) would not be read: the section `optimizer:` replaces how the task is optimized by "
        "itself. Write --optimizer.init_args.lr, or leave out that section: --optimizer null.",
    ),
    "rate beside a section optimizer, without init_args": (
        ["--config", "recipe:dreambooth", "--model.lr=0.1"],
        "--model.init_args.lr (--lr) would not be read: the section `optimizer:` replaces",
    ),
    "argument of a schedule beside a section optimizer": (
        ["--config", "recipe:dreambooth", "--model.lr_scheduler.class_path", "lora_plugins.tasks.warmup_cosine"],
        "--model.init_args.lr_scheduler would not be read: the section `optimizer:` replaces",
    ),
    "schedule beside a section optimizer": (
        ["--config=recipe:dreambooth", "--model.init_args.lr_scheduler=lora_plugins.tasks.warmup_cosine"],
        "--model.init_args.lr_scheduler would not be read: the section `optimizer:` replaces how the task is "
        "optimized by itself. Write --lr_scheduler",
    ),
    "a text without a model": (["--config", "data: 1\nlora: null\n"], "the configuration has no `model:`"),
    **{name: (["--config", "recipe:cls", *flags.split(" ")], said) for name, (flags, said) in OF_THE_RECIPE.items()},
}

LATER = {
    "device": ("--trainer.accelerator tpu", "error: trainer: Requirement 'torch_xla"),
    "argument of the model": ("--model.init_args.cutmx 0.5", "ImageClassificationTask has no 'cutmx'. Did"),
    "argument of the data": ("--data.init_args.batch_sizes 3", "DigitsDataModule has no 'batch_sizes'. Did"),
    "argument of a class that is called later": (
        "--model.init_args.lr_scheduler.init_args.eta_minn 1e-5",
        "lr_scheduler: CosineAnnealingLR has no 'eta_minn'. Did you mean 'eta_min'?",
    ),
    "what the caller gives": (
        "--model.init_args.lr_scheduler.init_args.T_max 30",
        "'T_max' of CosineAnnealingLR is what ImageClassificationTask gives it, and cannot be set.",
    ),
    "a class that is given all steps": (
        "--model.init_args.lr_scheduler torch.optim.lr_scheduler.StepLR",
        "lr_scheduler is StepLR, which takes 'step_size' after the optimizer",
    ),
    "above it": ("--model.init_args.modl.source timm", "ImageClassificationTask has no 'modl'. Did you mean 'model'?"),
    "below it": ("--model.init_args.model.sorce timm", "model has no 'sorce'. Did you mean 'source'?"),
    "type": ("--trainer.max_epochs three", "trainer.max_epochs: it is a whole number, and 'three' was given"),
    "type of an argument": ("--model.init_args.model.num_classes many", "a whole number, and 'many' was given"),
    "a choice": (
        "--trainer.precision bf16_mixed",
        "trainer.precision: it cannot be 'bf16_mixed'. Did you mean 'bf16-mixed'",
    ),
    "a choice without a near one": (
        "--lora_callback.merge_source middle",
        "lora_callback.merge_source: it cannot be 'middle'. There is 'best', 'last'.",
    ),
    "a module for a class": ("--model lora_plugins.tasks", "'lora_plugins.tasks' is no class of a LightningModule"),
    "a name of Lightning's": ("--trainer.accelerator gpuu", "trainer: You selected an invalid accelerator name"),
    "a number of Lightning's": ("--trainer.devices seven", "trainer: `devices` selected with"),
    "no class": ("--optimizer Best", "optimizer: 'Best' is not the path of a class, such as torch.optim.AdamW."),
    "no optimizer": ("--optimizer AdmaW", "'AdmaW' is not the path of a class. Did you mean 'torch.optim.AdamW'?"),
    "no scheduler": (
        "--lr_scheduler CosineAnealingLR",
        "is not the path of a class. Did you mean 'torch.optim.lr_scheduler.CosineAnnealingLR'?",
    ),
    "no callback": (
        "--trainer.callbacks+=EarlyStoping",
        "is not the path of a class. Did you mean 'lightning.pytorch.callbacks.EarlyStopping'?",
    ),
    "no logger": ("--trainer.logger CVSLogger", "Did you mean 'lightning.pytorch.loggers.CSVLogger'?"),
    "no package": (
        "--data.class_path DigitDataModule",
        "'DigitDataModule' is not the path of a class. Did you mean 'lora_plugins.tasks.DigitsDataModule'?",
    ),
    "path of a file": ("--data.class_path ./foo.Baz", "'./foo.Baz' is not the path of a class, such as"),
    "no module": ("--data.class_path foo.bar.Baz", "there is no module 'foo'"),
    "no module in a package": ("--optimizer torch.optm.Adam", "torch has no module 'optm'. Did you mean 'optim'?"),
    "no module in a module": ("--data json.decoder.no.X", "json.decoder has no module 'no'. There are none."),
    "no name in a module": ("--optimizer torch.optim.Admw", "torch.optim has no 'Admw'. Did you mean 'Adam', 'AdamW'"),
    "no class in a table of one": ("--data.class_path null", "data: its class_path is empty."),
    "no arguments in a table of them": ("--data.init_args null", "data: its init_args is empty."),
}


PLUGIN = """
import lightning.pytorch
import pytorch_lightning
from lora_plugins import hookimpl

assert pytorch_lightning.Trainer is lightning.pytorch.Trainer

@hookimpl
def lora_plugins_register_inits(registrar): ...
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    for name in ("run.yaml", "last.ckpt", "a.jpg", "base.safetensors"):
        (folder / name).write_text("trainer: {max_epochs: 1}")
    (folder / "broken.yaml").write_text("model: [")
    (folder / "twice.yaml").write_text("lora: {r: 4, alpha: 2, r: 8}")
    (folder / "sections.yaml").write_text("lora: {r: 4}\nmodel: x\nlora: {alpha: 8}\n")
    (folder / "list.yaml").write_text("trainer: [1, 2]")
    (folder / "images").mkdir()
    return folder


@dataclass(frozen=True)
class Inner:
    n: int = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()


class WithOptions(Callback):
    def __init__(
        self,
        init_kwargs: dict[str, int] | None = None,
        n: int = 1,
        fields: Outer | None = None,
        fails: bool = False,
        table: dict | None = None,
    ) -> None:
        if fails:
            raise ValueError("a mistake in this code")


class Unpacks(Callback):
    def __init__(self, options: dict[str, int] | None = None) -> None:
        dict(**options)


def made(width: int = -1) -> WithOptions:
    nn.LayerNorm([width, "a mistake"])
    return WithOptions()


def refused(arguments, message, capsys):
    assert main(["fit", *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("arguments", "message"), AT_ONCE.values(), ids=AT_ONCE)
def test_a_mistake_that_is_found_at_once(arguments, message, folder, capsys):
    refused([each.format(folder=folder) for each in arguments], message.format(folder=folder), capsys)


@pytest.mark.parametrize(
    "flag",
    [
        "--lora_callback.save_adapter_to=~/a.jpg/b",
        "--lora_callback.export_to=~/a.jpg/b.safetensors",
        "--trainer.default_root_dir=~/a.jpg/b",
    ],
)
def test_a_place_below_the_home_is_looked_at_there(flag, folder, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(folder))
    refused(["--config", "recipe:cls", flag], f"{folder}/a.jpg is a file.", capsys)


@needs_vision
@pytest.mark.parametrize(("arguments", "message"), LATER.values(), ids=LATER)
def test_a_mistake_that_the_parser_finds(arguments, message, capsys):
    refused(["--config", "recipe:cls", *arguments.split(" ")], message, capsys)


IN_A_FILE = {
    "field": ("model: {init_args: {model: {num_clases: 3}}}", "model has no 'num_clases'. Did you mean 'num_classes'?"),
    "field with fields": (
        "model: {init_args: {model: {optios: {depth: 4}}}}",
        "model has no 'optios'. Did you mean 'options'?",
    ),
    "argument with fields": (
        "model: {init_args: {modl: {name: x}}}",
        "ImageClassificationTask has no 'modl'. Did you mean 'model'?",
    ),
    "init_args": ("model: {init_ars: {lr: 1}}", "model: there is no 'init_ars' of a class. Did you mean 'init_args'?"),
    "empty init_args": (
        "optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    # lr: 0.1",
        "optimizer: its init_args is empty. Write what belongs there, or leave it out.",
    ),
    "callback": (
        "trainer: {callbacks: [{class_pah: lora_plugins.tasks.HtmlReport, init_args: {path: x}}]}",
        "trainer.callbacks: there is no 'class_pah' of a class. Did you mean 'class_path'?",
    ),
    "logger": (
        "trainer: {logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_arg: {save_dir: x}}}",
        "trainer.logger: there is no 'init_arg' of a class. Did you mean 'init_args'?",
    ),
    "beside an argument of nearly that name": (
        f"trainer: {{callbacks: [{{class_path: {__name__}.WithOptions, init_args: {{init_kwargs: {{}}, n: x}}}}]}}",
        "trainer.callbacks.n: it is a whole number, and 'x' was given",
    ),
    "number": ("trainer: {gradient_clip_val: many}", "trainer.gradient_clip_val: it is a number, and 'many' was given"),
    "list": ("data: {init_args: {digits: x}}", "data.digits: it is a list, such as [a, b], and 'x' was given"),
    "one number for two": (
        "data: {class_path: lora_plugins.tasks.ImageFolderDataModule, init_args: {root: ., image_size: 64}}",
        "data.image_size: it is a list, such as [224, 224], and '64' was given",
    ),
    "too few numbers": (
        "data: {class_path: lora_plugins.tasks.ImageFolderDataModule, init_args: {root: ., image_size: [64]}}",
        "data.image_size: it is a list of 2, and [64] was given",
    ),
    "name for fields": (
        "model: {init_args: {model: resnet50}}",
        "model.model: it is a table, such as {a: 1}, and 'resnet50' was",
    ),
    "name for a section": ("trainer: cpu", "trainer: it is a table, such as {a: 1}, and 'cpu' was given"),
    "number for a callback": (
        "trainer: {callbacks: [7]}",
        "trainer.callbacks: '7' is no class of a Callback. Write its path",
    ),
    "optimizer without a class": (
        "optimizer: {lr: 0.1}",
        "optimizer: Optimizer has no 'lr'. Name the class that has it: class_path",
    ),
    "plugin without a class": (
        "trainer: {plugins: [{a: 1}]}",
        "trainer.plugins: Precision has no 'a'. Name the class that has it: class_path",
    ),
    "options beside a class": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, monitor: loss}]}",
        "trainer.callbacks: beside class_path there is init_args alone: the options of the class belong in it",
    ),
    "callback without a class": (
        "trainer: {callbacks: [{monitor: x}]}",
        "trainer.callbacks: Callback has no 'monitor'. Name the class",
    ),
    "value of an optimizer": (
        "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: -1}}",
        "`optimizer` or `lr_scheduler` cannot be built: Invalid learning rate: -1",
    ),
    "too few numbers of an optimizer": (
        "optimizer: {class_path: torch.optim.AdamW, init_args: {betas: [0.9]}}",
        "optimizer.betas: it is a list of 2, and [0.9] was given",
    ),
    "choice in a list": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.LearningRateMonitor, "
        "init_args: {logging_interval: never}}]}",
        "trainer.callbacks.logging_interval: it cannot be 'never'. There is 'epoch', 'step'",
    ),
    "choice that the class itself refuses": (
        "trainer: {callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, "
        "init_args: {monitor: loss, mode: mx}}]}",
        "EarlyStopping: `mode` can be min, max, got mx",
    ),
    "class of another kind": (
        "model: {init_args: {lr_scheduler: torch.optim.AdamW}}",
        "model.lr_scheduler: 'torch.optim.AdamW' is no class of a LRScheduler, and no function that returns one",
    ),
    "function that returns something else": (
        "model: {init_args: {lr_scheduler: os.getcwd}}",
        "model.lr_scheduler: 'os.getcwd' is no class of a LRScheduler, and no function that returns one",
    ),
    "number for a path of a class": (
        "trainer: {callbacks: [{class_path: 7}]}",
        "trainer.callbacks[0].class_path is 7; it is the path of a class",
    ),
    "number for the arguments of a class": (
        "trainer: {callbacks: [{class_path: lora_plugins.tasks.BeforeAfter, init_args: 7}]}",
        "trainer.callbacks[0].init_args is 7; it holds keys with values",
    ),
    "number for fields": (
        f"trainer: {{callbacks: [{{class_path: {__name__}.WithOptions, init_args: {{fields: 7}}}}]}}",
        "trainer.callbacks.fields: it is a table, such as {a: 1}, and '7' was given",
    ),
    "number for fields in fields": (
        f"trainer: {{callbacks: [{{class_path: {__name__}.WithOptions, init_args: {{fields: {{inner: 7}}}}}}]}}",
        "Outer.inner is no table, such as {a: 1}, and has to be one",
    ),
    "name for fields of the configuration": (
        "lora: absent",
        "lora: it is a table, such as {a: 1}, or the path of a file that holds one, and 'absent' was given",
    ),
}


@needs_vision
@pytest.mark.parametrize(("text", "message"), IN_A_FILE.values(), ids=IN_A_FILE)
def test_a_key_of_a_file(text, message, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text(text)
    refused(["--config", "recipe:cls", "--config", str(tmp_path / "more.yaml")], message, capsys)


@needs_vision
def test_a_table_of_a_class_may_have_keys_of_any_names(tmp_path, capsys):
    options = {"table": {"class_path": [1, 2]}}
    callbacks = [{"class_path": f"{__name__}.WithOptions", "init_args": options}]
    (tmp_path / "more.yaml").write_text(json.dumps({"trainer": {"callbacks": callbacks}}))
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["fit", "--config", "recipe:cls", "--config", str(tmp_path / "more.yaml"), "--print_config"])
    assert "init_args:" in capsys.readouterr().out


@needs_vision
@pytest.mark.parametrize(
    "raising",
    ["WithOptions, init_args: {fails: true}", "Unpacks", "made"],
    ids=["class", "class that unpacks None", "function that calls a class of torch"],
)
def test_what_code_of_the_user_raises_keeps_its_traceback(raising):
    arguments = f"trainer: {{callbacks: [{{class_path: {__name__}.{raising}}}]}}\n"
    with pytest.raises((TypeError, ValueError), match=r"a mistake|must be a mapping|tuple of ints") as raised:
        main(["fit", "--config", "recipe:cls", "--config", arguments])
    assert not isinstance(raised.value, LoraError)


@needs_vision
def test_what_is_no_checkpoint_is_said_in_one_line(folder, capsys):
    """And not in torch's many on how to unpickle it."""
    message = "no.ckpt cannot be read as a checkpoint: UnpicklingError: WeightsUnpickler error: Unsupported operand"
    (folder / "no.ckpt").write_text("no checkpoint")
    refused(["--config", "recipe:cls", "--ckpt_path", str(folder / "no.ckpt")], message, capsys)


def test_the_fields_of_a_file_are_those_of_its_class(capsys):
    known = ", ".join(sorted(repr(field.name) for field in fields(AdapterFile)))
    message = f"a file has no 'zzzz'. There is {known}"
    refused(["--config", "recipe:cls", "--lora_callback.save_adapter_to={zzzz: 1}"], message, capsys)


def test_mistakes_found_at_once_import_nothing_heavy(folder):
    """Lightning and what it brings take several seconds."""
    calls = [["fit", *(each.format(folder=folder) for each in arguments)] for arguments, _ in AT_ONCE.values()]
    code = (
        "import sys\nfrom lora_plugins.cli.main import main\n"
        f"for call in {[*calls, ['fit', '--help'], ['recipes']]!r}:\n    main(call)\n"
        "sys.exit(bool({'lightning', 'torchvision', 'transformers', 'jsonargparse'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False).returncode == 0


@pytest.mark.slow
def test_a_recipe_without_its_libraries_is_one_line_with_what_to_install():
    code = (
        "import sys, lightning.pytorch\nsys.modules['PIL'] = None  # after torchmetrics, which draws where it can\n"
        "from lora_plugins.cli.main import main\nsys.exit(main(['fit', '--config', 'recipe:cls']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    name = "lora_plugins.tasks.ImageClassificationTask"
    assert done.stderr == f"error: model: {name} needs PIL. Run: pip install 'lora-plugins[vision]'\n"


def test_a_gpu_that_is_not_there(capsys):
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there is one")
    refused(["--config", "recipe:cls", "--trainer.accelerator", "gpu"], "torch finds no GPU here", capsys)


@needs_vision
def test_short_flags_are_the_dotted_ones(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config=recipe:cls", "--rank=3", "--epochs", "2", "--lr", "0.25", "--print_config"])
    printed = capsys.readouterr().out
    assert "r: 3" in printed
    assert "max_epochs: 2" in printed
    assert "lr: 0.25" in printed


AS_THE_PARSER = {
    "a power of ten": (["--lora.dropout", "1e-1"], "dropout: 0.1"),
    "a negative number": (["--model.init_args.lr", "-.5"], "lr: -0.5"),
    "a power without its sign": (["--lora.alpha", "1.5e1"], "alpha: 15.0"),
    "one more in a list": (["--lora.modules_to_save+", "head"], "modules_to_save:\n  - head"),
    "some more in a list": (["--lora.modules_to_save+=[head, fc]"], "modules_to_save:\n  - head\n  - fc"),
}


@needs_vision
@pytest.mark.parametrize(("arguments", "printed"), AS_THE_PARSER.values(), ids=AS_THE_PARSER)
def test_values_are_read_as_the_parser_reads_them(arguments, printed, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config=recipe:cls", *arguments, "--print_config"])
    assert printed in capsys.readouterr().out


class AnyFolderDataModule(Data):
    """Of somebody else, and makes its folder by itself."""

    def __init__(self, root: str, batch_size: list[int]):
        super().__init__()


def test_arguments_of_other_data_modules_are_their_matter(config):
    data = {"class_path": f"{__name__}.AnyFolderDataModule", "init_args": {"root": "new", "batch_size": [2, 3]}}
    assert main(["plan", "--config", config(data=data, optimizer=None, lr_scheduler=None)]) == 0


def test_options_of_a_later_configuration_are_the_only_ones(tmp_path, capsys):
    """Those of another init would be refused."""
    options = {"loftq": "{bits: 2}", "pissa": "{niter: -1}"}
    for init, given in options.items():
        (tmp_path / f"{init}.yaml").write_text(f"lora: {{init: {init}, init_options: {given}}}")
    configs = [f"--config={path}" for path in ("recipe:cls", *(tmp_path / f"{init}.yaml" for init in options))]
    refused(configs, "niter of pissa is a count of iterations, or None for what is exact, not -1.", capsys)


@needs_vision
def test_a_wrong_name_is_printed_where_the_configuration_is(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config=recipe:cls", "--lora.init=kaimin", "--print_config"])
    assert "init: kaimin" in capsys.readouterr().out


def test_plugins_that_import_pytorch_lightning_get_that_of_the_command(tmp_path):
    """Also where they are loaded before Lightning, for a look at names."""
    (tmp_path / "users_own.py").write_text(PLUGIN)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "lora_plugins", "plan", "--config=recipe:cls", "--lora.init=kaimin"],
        env={**os.environ, LOAD_VARIABLE: str(tmp_path / "users_own.py")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr.splitlines()[-1] == "error: There is no init 'kaimin'. Did you mean 'kaiming'?"


def test_help_is_one_page(capsys):
    assert main(["fit", "--help"]) == 0
    page = capsys.readouterr().out
    assert page.count("\n") < 40
    for word in ("ImageClassificationTask", "SemanticSegmentationTask", "target_modules", "--epochs", "recipe:"):
        assert word in page


def test_every_flag_is_in_the_whole_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--help-all"])
    assert {"--trainer.max_epochs", "--lora", "--lora_callback.target"} <= set(capsys.readouterr().out.split())


class TestRecipes:
    def test_they_are_listed_with_their_whole_sentence(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        assert main(["recipes"]) == 0
        listed, _, how = capsys.readouterr().out.partition("\n\n")
        assert "seg_folder" in listed
        assert "Image classification on your own images, one folder a class:" in " ".join(listed.split())
        assert 'as "a sks digit" from six pictures' in " ".join(listed.split())
        assert max(map(len, listed.splitlines())) <= 80
        assert "recipe:NAME" in how

    def test_one_is_shown_and_copied(self, capsys, tmp_path):
        assert main(["recipes", "show", "cls"]) == 0
        shown = capsys.readouterr().out
        copied = tmp_path / "mine.yaml"
        assert main(["recipes", "copy", "cls", str(copied)]) == 0
        assert copied.read_text() == shown
        assert main(["recipes", "copy", "cls", str(copied)]) == 1
        assert "exists already" in capsys.readouterr().err
        assert main(["recipes", "copy", "cls", str(tmp_path / "new" / "mine.yaml")]) == 0
        assert main(["recipes", "copy", "cls", str(copied / "it.yaml")]) == 1
        assert f"{copied} is a file. Name another place." in capsys.readouterr().err

    def test_a_link_to_nothing_is_not_replaced_by_a_copy(self, capsys, tmp_path):
        (tmp_path / "mine.yaml").symlink_to("gone")
        assert main(["recipes", "copy", "cls", str(tmp_path / "mine.yaml")]) == 1
        assert "exists already" in capsys.readouterr().err
        assert (tmp_path / "mine.yaml").is_symlink()

    def test_a_full_disk_leaves_no_part_of_a_copy(self, capsys, tmp_path):
        copied = tmp_path / "mine.yaml"
        with no_file_beyond(100):
            assert main(["recipes", "copy", "cls", str(copied)]) == 1
        assert f" for {copied}. Make room" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []


def test_a_message_that_is_not_known_keeps_its_words():
    assert explained("Something else went wrong.") == "Something else went wrong."
