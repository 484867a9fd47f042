"""The best checkpoint at the end, and runs that go on from one."""

import copy
import dataclasses
import shutil

import pytest
import torch
import transformers
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, StateError
from lora_plugins.integrations.transformers.reloading import restore
from lora_plugins.plugins import default_registry
from tests.integrations.transformers.toys import (
    CENTERED,
    STORED,
    VIT,
    Centered,
    arguments,
    build_vit,
    differing,
    images,
    logits,
    scenes,
    segformer,
    trainer,
    values,
    vit,
)
from tests.state.interrupted import passed, stopped


class TestBestModel:
    @pytest.mark.parametrize("merge", [False, True], ids=["adapted", "merged"])
    def test_it_is_loaded_at_the_end(self, tmp_path, merge):
        fields = {"load_best_model_at_end": True, "eval_strategy": "epoch", "metric_for_best_model": "accuracy"}
        seen = []

        def accuracy(prediction):  # the first epoch is the best one
            seen.append(len(seen))
            return {"accuracy": -float(len(seen))}

        run = trainer(tmp_path, compute_metrics=accuracy, merge_on_train_end=merge, num_train_epochs=3, **fields)
        run.train()
        best = vit()
        lora = LoraModel.load_adapter(best, tmp_path / "checkpoint-3")
        assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
        if merge:
            lora.merge_and_unload()
        assert not differing(values(best), values(run.model))
        assert not torch.equal(logits(best), logits(after(tmp_path / "checkpoint-9")))


def after(folder):
    model = vit()
    LoraModel.load_adapter(model, folder)
    return model


class StopAfterOneEpoch(transformers.TrainerCallback):
    """Ends a run early, on the schedule of the whole one."""

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


class Turned(nn.Linear):
    """Has its inputs first in its square weight, which no plugin but one for it knows."""

    def forward(self, x):
        return x @ self.weight + self.bias


class Turning(Centered):
    def __init__(self):
        super().__init__()
        self.center = Turned(4, 4)


TURNED = """
from lora_plugins import ColumnMajorPlugin, hookimpl


class TurnedPlugin(ColumnMajorPlugin):
    name = "turned"
    module_type = "tests.integrations.transformers.test_reloading.Turned"


@hookimpl
def lora_plugins_register_layers(registrar):
    registrar.add(TurnedPlugin())
"""


class TestResume:
    @pytest.mark.parametrize(
        "config",
        [
            pytest.param(VIT, id="kaiming"),
            pytest.param(LoraConfig(r=2, target_modules=["q_proj"], init="pissa"), id="pissa"),
            pytest.param(LoraConfig(r=2, target_modules=["q_proj"], init="loftq", bias="all"), id="loftq"),
            pytest.param(LoraConfig(r=2, target_modules=["q_proj"], variant="dora"), id="dora"),
        ],
    )
    def test_a_resumed_run_equals_one_that_was_never_stopped(self, tmp_path, config):
        straight = trainer(tmp_path / "straight", config=config)
        straight.train()
        stopped = trainer(tmp_path / "stopped", config=config, callbacks=[StopAfterOneEpoch()])
        stopped.train()
        assert stopped.state.global_step == 3
        torch.manual_seed(99)
        resumed = trainer(tmp_path / "stopped", config=config)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.global_step == 6
        assert not differing(values(straight.model), values(resumed.model))

    @pytest.mark.parametrize("norm", ["freeze", "track"])
    def test_statistics_of_batch_normalization_go_on_too(self, tmp_path, norm):
        config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["decode_head.classifier"], norm=norm)
        straight = trainer(tmp_path, segformer(), config, scenes())
        start = values(straight.model)
        straight.train()
        moved = [name for name in differing(start, values(straight.model)) if "running" in name]
        assert bool(moved) == (norm == "track")
        resumed = trainer(tmp_path, segformer(), config, scenes())
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert not differing(values(straight.model), values(resumed.model))

    def test_buffers_of_saved_modules_go_on_too(self, tmp_path):
        config = dataclasses.replace(CENTERED, modules_to_save=["center"])
        straight = trainer(tmp_path, Centered(), config)
        straight.train()
        assert straight.model.center.mean.any()
        resumed = trainer(tmp_path, Centered(), config)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not differing(values(straight.model), values(resumed.model))

    def test_with_a_constant_rate_in_the_middle_of_an_epoch(self, tmp_path):
        fields = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        straight = trainer(tmp_path / "straight", **fields)
        straight.train()
        resumed = trainer(tmp_path / "resumed", **fields)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
        assert not differing(values(straight.model), values(resumed.model))

    def test_by_the_same_trainer(self, tmp_path):
        run = trainer(tmp_path)
        run.train()
        first = values(run.model)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not differing(first, values(run.model))

    def test_of_models_that_model_init_makes(self, tmp_path):
        straight = trainer(tmp_path, model_init=build_vit)
        straight.train()
        again = trainer(tmp_path, model_init=build_vit)
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not differing(values(straight.model), values(again.model))

    def test_with_the_layer_types_that_there_were(self, tmp_path, monkeypatch):
        """A plugin that was installed since views the weight otherwise, with A and B of the same shapes."""
        config = LoraConfig(r=2, target_modules=["center"])
        straight = trainer(tmp_path, Turning(), config)
        straight.train()
        (path := tmp_path / "turned.py").write_text(TURNED)
        monkeypatch.setenv("LORA_PLUGINS_LOAD", str(path))
        default_registry.cache_clear()
        try:
            resumed = trainer(tmp_path, Turning(), config)
            assert [layer.plugin.name for layer in LoraModel(resumed.model).plans["default"].layers] == ["turned"]
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        finally:
            default_registry.cache_clear()
        assert not differing(values(straight.model), values(resumed.model))

    def test_another_changed_base_is_rebuilt(self, tmp_path):
        """As on another machine, whose decomposition differs in the last bits."""
        config = LoraConfig(r=2, target_modules=["q_proj"], init="pissa")
        straight = trainer(tmp_path, config=config)
        straight.train()
        trained = values(straight.model)
        resumed = trainer(tmp_path, config=config)
        for run in (resumed, straight):  # one that has no optimizer yet, and one that has
            with torch.no_grad():
                run.model.vit.layers[0].attention.q_proj._parameters["weight"].mul_(1 + 1e-6)
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
            assert not differing(trained, values(run.model))

    def test_an_adapter_whose_restoring_is_stopped_is_what_it_was(self, tmp_path):
        saved, prepared = vit(), vit()
        LoraModel(prepared, VIT)
        lora = LoraModel(saved, VIT)
        with torch.no_grad():
            for parameter in saved.parameters():
                parameter.add_(parameter.requires_grad)
        lora.save_adapter(tmp_path)

        def put(model):
            restore(model, "default", tmp_path)

        put(model := copy.deepcopy(prepared))  # the first call passes other lines, too
        assert not differing(values(saved), values(model))
        before, model = values(prepared), copy.deepcopy(prepared)
        lines = passed(lambda: put(model))
        for at in [at for at, line in enumerate(lines) if line.startswith("transformers/reloading.py")][-20:]:
            model = copy.deepcopy(prepared)
            where, raised = stopped(lambda model=model: put(model), at)
            assert raised, where
            assert not differing(before, values(model)), where

    def test_what_the_user_froze_stays_frozen_on_a_rebuilt_base(self, tmp_path):
        def frozen_a():
            run = trainer(tmp_path, config=LoraConfig(r=2, target_modules=["q_proj"], init="pissa"))
            for name, parameter in run.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and ".lora_A" not in name)
            return run

        straight = frozen_a()
        straight.train()
        resumed = frozen_a()
        with torch.no_grad():
            resumed.model.vit.layers[0].attention.q_proj._parameters["weight"].mul_(1 + 1e-6)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not differing(values(straight.model), values(resumed.model))

    def test_an_optimizer_of_the_users_cannot_follow_a_rebuilt_base(self, tmp_path):
        model, config = vit(), LoraConfig(r=2, target_modules=["q_proj"], init="pissa")
        LoraModel(model, config)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        run = trainer(tmp_path, model, None, optimizers=(optimizer, None))
        run.train()
        with torch.no_grad():
            model.vit.layers[0].attention.q_proj._parameters["weight"].mul_(1 + 1e-6)
        with pytest.raises(StateError, match="holds the tensors that were"):
            run.train(resume_from_checkpoint=True)

    def test_another_configuration_is_refused(self, tmp_path):
        trainer(tmp_path).train()
        run = trainer(tmp_path, config=LoraConfig(r=4, target_modules=["q_proj"]))
        before = values(run.model)
        with pytest.raises(AdapterFileError, match=r"another configuration: r is 2 in the file and 4 here; "):
            run.train(resume_from_checkpoint=True)
        assert not differing(before, values(run.model))

    @pytest.mark.parametrize("config", [pytest.param(VIT, id="float"), pytest.param(STORED, id="nf4")])
    def test_another_base_is_refused(self, tmp_path, config):
        trainer(tmp_path, config=config).train()
        other = vit()
        nn.init.normal_(other.vit.layers[0].attention.q_proj.weight)
        run = trainer(tmp_path, other, config, save_strategy="no")
        run.train()
        before = values(run.model)
        with pytest.raises(AdapterFileError, match=r"another base: .*q_proj"):
            run.train(resume_from_checkpoint=True)
        assert not differing(before, values(run.model))
        run.train()  # with the optimizer that it has

    def test_a_damaged_checkpoint_is_refused(self, tmp_path):
        trainer(tmp_path).train()
        (file,) = (tmp_path / "checkpoint-6").glob("adapter-*.safetensors")
        file.write_bytes(file.read_bytes()[:-1])
        run = trainer(tmp_path)
        before = values(run.model)
        with pytest.raises(AdapterFileError, match="truncated or changed"):
            run.train(resume_from_checkpoint=True)
        assert not differing(before, values(run.model))

    @pytest.mark.parametrize("name", ["trainer_state.json", "optimizer.pt", "scheduler.pt"])
    def test_a_checkpoint_that_was_not_written_whole_is_refused(self, tmp_path, name):
        trainer(tmp_path).train()
        (tmp_path / "checkpoint-6" / name).unlink()
        run = trainer(tmp_path)
        before = values(run.model)
        with pytest.raises(StateError, match=f"checkpoint-6 has no {name}: a run was stopped"):
            run.train(resume_from_checkpoint=True)
        assert not differing(before, values(run.model))

    @pytest.mark.parametrize("left", ["adapter-*.safetensors", ".*"], ids=["the tensors alone", "nothing"])
    def test_a_checkpoint_that_has_no_adapter_yet_is_told_from_one_of_a_whole_model(self, tmp_path, left):
        trainer(tmp_path).train()
        folder = tmp_path / "checkpoint-6"
        kept = {*folder.glob(left)}
        for file in {*folder.iterdir()} - kept:
            file.unlink()
        with pytest.raises(StateError, match=r"checkpoint-6 has neither .*: a run was stopped .* Remove it"):
            trainer(tmp_path).train(resume_from_checkpoint=True)
        shutil.rmtree(folder)
        trainer(tmp_path).train(resume_from_checkpoint=True)

    @pytest.mark.parametrize(
        ("given", "message"),
        [("checkpoint-66", "has no 'checkpoint-66'. Did you mean"), (".", "Name the checkpoint in it: .*checkpoint-6")],
        ids=["one that does not exist", "the folder of all"],
    )
    def test_what_is_no_checkpoint_is_told_with_those_there_are(self, tmp_path, given, message):
        trainer(tmp_path).train()
        with pytest.raises(StateError, match=message):
            trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / given))

    def test_a_checkpoint_of_a_whole_model_is_refused(self, tmp_path):
        transformers.Trainer(vit(), arguments(tmp_path), train_dataset=images()).train()
        with pytest.raises(StateError, match="holds no adapter"):
            trainer(tmp_path).train(resume_from_checkpoint=True)
