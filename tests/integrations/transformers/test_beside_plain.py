"""Drawn runs of LoraTrainer beside the plain Trainer, whose A and B are torch's own parametrizations."""

from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
import transformers
from torch.nn.utils.parametrize import register_parametrization

from lora_plugins import LoraModel
from lora_plugins.integrations.transformers import LoraTrainer
from tests.fits.compare import differences
from tests.fits.reference import Start, Update
from tests.fits.weights import effective
from tests.integrations.transformers.toys import SEGFORMER, VIT, arguments, images, scenes, segformer, vit
from tests.slow import slow_but

RUNS = slow_but(range(10), range(2))
TOLERANCE = 1e-6
"""By what share of the largest value a result may be off: Adam divides by small gradients, which magnifies rounding."""

MODELS = {"vit": (vit, images, VIT), "segformer": (segformer, scenes, SEGFORMER)}
LORA = {
    "init": ("kaiming", "gaussian", "pissa", "olora"),
    "variant": ("lora", "dora"),
    "bias": ("none", "all", "lora_only"),
    "use_rslora": (False, True),
    "memory": ("normal", "low"),
}
ARGUMENTS = {
    "optim": ("adamw_torch", "adamw_torch_fused", "sgd", "rmsprop"),
    "lr_scheduler_type": ("linear", "cosine", "constant_with_warmup", "polynomial"),
    "warmup_steps": (0, 2),
    "weight_decay": (0.0, 0.1),
    "gradient_accumulation_steps": (1, 2),
    "max_grad_norm": (1.0, 0.1, 0.0),
    "activation_checkpointing": (False, True),
    "per_device_train_batch_size": (2, 3),
    "save_strategy": ("steps", "epoch"),
    "load_best_model_at_end": (False, True),
    "greater_is_better": (False, True),
    "save_total_limit": (None, 1),
    "seed": (3, 4),
}
"""What is drawn of the configuration and of the arguments."""

NORM = "track"
"""Running statistics move, as the plain Trainer moves them."""
FIXED = {
    "eval_steps": 2, "save_steps": 2, "logging_steps": 1, "logging_strategy": "steps", "metric_for_best_model": "loss",
}  # fmt: skip
LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss")


class Seeded(transformers.TrainerCallback):
    """Gives each step the same random numbers, whatever was drawn before it, and may end the run at one."""

    def __init__(self, last=None):
        self.last = last

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(1000 + state.global_step)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.last:
            control.should_save = control.should_training_stop = True


class Whole(transformers.Trainer):
    """The plain Trainer, whose checkpoints hold the state dict: `save_pretrained` renames what it writes."""

    def _save(self, output_dir=None, state_dict=None):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        torch.save(self.model.state_dict(), Path(output_dir) / "state.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.model.load_state_dict(torch.load(Path(resume_from_checkpoint) / "state.pt"))

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class Ours:
    """Runs of LoraTrainer.

    Args:
        name: The model.
        config: How it is adapted.
        adapter: What the adapter is called.
        fields: Arguments of the trainer.
    """

    def __init__(self, name, config, adapter, fields):
        self.name, self.config, self.adapter, self.fields = name, config, adapter, fields

    def base(self):
        return MODELS[self.name][0]().double()

    def trainer(self, folder, model=None, last=None):
        data = [{**each, "pixel_values": each["pixel_values"].double()} for each in MODELS[self.name][1](8)]
        args = arguments(folder, eval_strategy=self.fields["save_strategy"], **FIXED, **self.fields)
        return self.make(model, args=args, train_dataset=data, eval_dataset=data[:4], callbacks=[Seeded(last)])

    def make(self, model, **given):
        config = self.config if model is None else None
        return LoraTrainer(model or self.base(), lora_config=config, adapter_name=self.adapter, **given)

    def read(self, folder):
        model = self.base()
        LoraModel.load_adapter(model, folder)
        return model


class Plain(Ours):
    """The same runs of the plain Trainer.

    Args:
        ours: The runs.
        folder: A place for files.
    """

    def __init__(self, ours, folder):
        super().__init__(ours.name, ours.config, ours.adapter, ours.fields)
        self.start = ours.trainer(folder).model

    def make(self, model, **given):
        return Whole(model or self.adapted(), **given)

    def read(self, folder):
        model = self.adapted()
        model.load_state_dict(torch.load(folder / "state.pt"))
        return model

    def adapted(self):
        """The model, with parametrizations that start where the adapter does."""
        model, trained = self.base(), dict(self.start.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained[name].requires_grad)
        for plan in LoraModel(self.start).plans[self.adapter].layers:
            layer, other = model.get_submodule(plan.name), self.start.get_submodule(plan.name)
            layer.weight.data.copy_(trained[f"{plan.name}.weight"])
            factors = (getattr(other, key)[self.adapter].detach() for key in ("lora_A", "lora_B"))
            start = Start(layer.weight.detach().clone(), *factors, plan.settings.scaling)
            update = Update(start, getattr(layer, "groups", 1), columns=False, magnitudes=self.config.variant == "dora")
            register_parametrization(layer, "weight", update)
        return model


def carry_out(side, folder, last):
    """Stops a run, resumes it with a new model, and trains once more; returns all that can be seen of it."""
    record = {}

    def train(what, trainer, **given):
        trainer.train(**given)
        record[f"{what}: log"] = [
            float(entry[key]) for entry in trainer.state.log_history for key in LOGGED if key in entry
        ]
        record[f"{what}: weights"] = effective(trainer.model)
        for path in sorted(folder.glob("*/checkpoint-*")):
            record[f"{what}: {path.relative_to(folder)}"] = effective(side.read(path))
        return trainer.model

    train("stopped", side.trainer(folder / "run", last=last))
    model = train("resumed", side.trainer(folder / "run"), resume_from_checkpoint=True)
    train("again", side.trainer(folder / "further", model))
    return record


@pytest.fixture
def double():
    """The Trainer adds up losses in the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# the base is random, so that layers whose biases are not trained have those of new ones
@pytest.mark.filterwarnings("ignore:.* look newly initialized, and nothing trains them:UserWarning")
@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("run", RUNS)
def test_drawn_runs(tmp_path, run):
    random = Random(f"trainer.{run}")
    fields = {name: random.choice(values) for name, values in ARGUMENTS.items()}
    name = random.choice(list(MODELS))
    drawn = {key: random.choice(values) for key, values in LORA.items()}
    config = replace(MODELS[name][2], dropout=0.0, norm=NORM, **drawn)
    ours = Ours(name, config, random.choice(("default", "bias")), fields)
    found = carry_out(ours, tmp_path / "ours", last := random.choice((1, 2, 3)))
    expected = carry_out(Plain(ours, tmp_path / "start"), tmp_path / "plain", last)
    assert not list(differences(found, expected, TOLERANCE)), (fields, config)
