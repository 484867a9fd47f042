"""What would train nothing, or what no checkpoint would hold, is refused or told."""

import warnings

import pytest
import torch
import transformers
from torch import nn

from lora_plugins import LoraConfig, LoraModel, StateError
from tests.integrations.transformers.toys import CENTERED, VIT, Centered, trainer, vit


def test_an_adapter_that_does_not_act_is_not_trained_in_silence(tmp_path):
    model = vit()
    run = trainer(tmp_path, model)
    LoraModel(model).set_adapter([])
    with pytest.raises(StateError, match=r"trains the adapter 'default', and none is active"):
        run.train()
    LoraModel(model).set_adapter("default")
    with LoraModel(model).disable_adapter(), pytest.raises(StateError, match=r"outside of disable_adapter\(\)"):
        run.train()
    LoraModel(model).merge_adapter()
    with pytest.raises(StateError, match=r"Training is not possible while 'default' is merged"):
        run.train()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda lora: lora.set_adapter(["default"], weights=[0.5]), r"the weight 0\.5", id="weighted"),
        pytest.param(lambda lora: lora.set_adapter("default", trainable=False), "Nothing .* gradient", id="frozen"),
        pytest.param(
            lambda lora: setattr(lora.model.vit.layers[0].attention, "q_proj", nn.Linear(16, 16)),
            r"update of .*layers\.0\.attention\.q_proj.* is gone",
            id="replaced",
        ),
    ],
)
def test_what_no_training_and_no_checkpoint_would_reach(tmp_path, change, message):
    run = trainer(tmp_path, vit(), LoraConfig(r=2, target_modules=["q_proj"]))
    change(LoraModel(run.model))
    with pytest.raises(StateError, match=message):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.parametrize("saved", [["classifier"], []], ids=["trained", "forgotten"])
def test_a_new_head_that_nobody_trains_is_told(tmp_path, saved):
    model = vit()
    with torch.no_grad():  # as from_pretrained gives it: training has left nothing but the head new
        for layer in model.vit.modules():
            if isinstance(layer, nn.Linear):
                layer.bias.add_(0.1)
    run = trainer(tmp_path, model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=saved))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run.train()
    said = [str(each.message) for each in told if "newly initialized" in str(each.message)]
    assert [text.partition(" look")[0] for text in said] == ([] if saved else ["'classifier'"])


def test_what_no_checkpoint_would_hold(tmp_path):
    run = trainer(tmp_path)
    run.model.vit.layernorm.weight.requires_grad_(True)
    with pytest.raises(StateError, match=r"'vit\.layernorm\.weight' are trained and are no part of the adapter"):
        run.train()


def test_a_buffer_that_no_checkpoint_would_hold(tmp_path):
    run = trainer(tmp_path, Centered(), CENTERED)
    with pytest.raises(StateError, match=r"Training changes 'center\.mean', buffers .* Name their modules"):
        run.train()
    assert run.state.global_step == 0
    assert not list(tmp_path.glob("checkpoint-*"))


# the checkpoint is written before `on_save` refuses the run, and warns of the same
@pytest.mark.filterwarnings("ignore:The adapter does not hold .center.mean.:UserWarning")
@pytest.mark.parametrize(("event", "steps"), [("on_evaluate", 3), ("on_train_end", 6)])
def test_a_buffer_that_changes_late(tmp_path, event, steps):
    def changed(callback, args, state, control, model, **kwargs):
        model.center.mean.add_(1)

    model = Centered()
    model.center.momentum = 0.0
    callback = type("Callback", (transformers.TrainerCallback,), {event: changed})()
    run = trainer(tmp_path, model, CENTERED, eval_strategy="epoch", callbacks=[callback])
    with pytest.raises(StateError, match=r"Training changes 'center\.mean'"):
        run.train()
    assert run.state.global_step == steps


def test_a_buffer_that_need_not_be_kept(tmp_path):
    model = Centered()
    model.center.register_buffer("mean", model.center.mean, persistent=False)  # as the message says
    run = trainer(tmp_path, model, CENTERED)
    run.train()
    assert model.center.mean.any()


# the checkpoint is written before `on_save` refuses the run, and warns of the same
@pytest.mark.filterwarnings("ignore:'vit.layernorm.weight', .* are no part of an adapter:UserWarning")
@pytest.mark.parametrize("event", ["on_epoch_begin", "on_step_end"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda model: model.vit.layernorm.requires_grad_(True), "no part of the adapter", id="unfrozen"),
        pytest.param(lambda model: LoraModel(model).set_adapter("other"), "'other' is active", id="switched"),
        pytest.param(lambda model: LoraModel(model).merge_adapter(), "is merged", id="merged"),
    ],
)
def test_what_a_callback_changes_while_it_trains(tmp_path, event, change, message):
    def changed(callback, args, state, control, model, **kwargs):
        if state.global_step == 3:  # the last step of the first epoch
            change(model)

    model = vit()
    LoraModel(model, VIT).add_adapter("other", VIT)
    optimizer = torch.optim.AdamW(model.parameters())  # as those who unfreeze later make it
    callback = type("Callback", (transformers.TrainerCallback,), {event: changed})()
    run = trainer(tmp_path, model, None, optimizers=(optimizer, None), callbacks=[callback])
    with pytest.raises(StateError, match=message):
        run.train()
    assert run.state.global_step == 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_that_cuts_the_backward(tmp_path):
    kwargs = {"use_reentrant": True}
    run = trainer(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
    with pytest.raises(StateError, match="need none: set use_reentrant=False"):
        run.train()


def test_a_layer_that_takes_no_part_is_told(tmp_path):
    run = trainer(tmp_path)
    run.model.vit.layers[0].register_forward_hook(lambda _, inputs, output: output.detach())
    with pytest.warns(UserWarning, match=r"layers\.0\.attention\.q_proj\.lora_A.* got no gradient in the first step"):
        run.train()


def test_a_backward_that_passes_the_adapter_by(tmp_path):
    run = trainer(tmp_path)
    run.model.classifier.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
    with pytest.raises(StateError, match="gave the adapter no gradient"):
        run.train()


def test_an_optimizer_that_steps_in_hooks_is_named(tmp_path):
    run = trainer(tmp_path)
    for parameter in run.model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda tensor: setattr(tensor, "grad", None))
    with pytest.raises(StateError, match=r"gave the adapter no gradient.* an optimizer in a hook; let the Trainer's"):
        run.train()
