"""`LoraTrainer`: real runs of the Trainer of transformers on small models."""

import dataclasses
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from lora_plugins import (
    AdapterFileError,
    ConfigError,
    InitData,
    LoraConfig,
    LoraModel,
    MergeError,
    StateError,
    TargetError,
)
from lora_plugins.adapter import model_state
from lora_plugins.integrations.transformers import LoraTrainer
from lora_plugins.plugins import default_registry
from tests.integrations.transformers.toys import (
    CENTERED,
    SEGFORMER,
    STORED,
    VIT,
    Centered,
    arguments,
    differing,
    images,
    logits,
    scenes,
    segformer,
    trainer,
    values,
    vit,
)


def build_vit():
    """A `model_init`, which the Trainer calls with a trial if it takes anything."""
    return vit()


BEST = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "loss"}


def files(folder):
    return {path.name for path in Path(folder).iterdir()}


class TestCheckpoints:
    @pytest.mark.parametrize(
        ("build", "config", "data"), [(vit, VIT, images), (segformer, SEGFORMER, scenes)], ids=["vit", "segformer"]
    )
    def test_they_hold_the_adapter_alone_and_give_the_trained_model(self, tmp_path, build, config, data):
        run = trainer(tmp_path, build(), config, data())
        start = values(run.model)
        run.train()
        last = max(tmp_path.glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        kept = {name for name in files(last) if name.endswith((".safetensors", ".bin", ".json"))}
        assert {re.sub("-[0-9a-f]{16}", "", name) for name in kept} == {
            "adapter.json", "adapter.safetensors", "trainer_state.json", "training_args.bin",
        }  # fmt: skip
        moved = differing(start, values(run.model))
        assert moved
        assert all(".lora_" in name or any(saved in name for saved in ("classifier", "batch_norm")) for name in moved)
        again = build()
        LoraModel.load_adapter(again, last)
        assert not differing(values(again), values(run.model))
        assert torch.equal(logits(again, data()), logits(run.model, data()))

    def test_save_model_writes_an_adapter_folder(self, tmp_path):
        run = trainer(tmp_path / "run")
        run.train()
        run.save_model(tmp_path / "final")
        again = vit()
        LoraModel.load_adapter(again, tmp_path / "final")
        assert torch.equal(logits(again), logits(run.model))
        run.save_model()
        assert "adapter.json" in files(tmp_path / "run")

    def test_what_prepares_the_inputs_is_saved_too(self, tmp_path):
        processor = transformers.ViTImageProcessor(size={"height": 8, "width": 8})
        run = trainer(tmp_path)
        run.processing_class = processor
        run.save_model(tmp_path / "final")
        assert "preprocessor_config.json" in files(tmp_path / "final")

    def test_old_ones_are_removed(self, tmp_path):
        trainer(tmp_path, save_total_limit=1, num_train_epochs=3).train()
        assert files(tmp_path) == {"checkpoint-9"}


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
    module_type = "tests.integrations.transformers.test_trainer.Turned"


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


class TestMerging:
    def test_at_the_end_on_request(self, tmp_path):
        run = trainer(tmp_path / "a")
        run.train()
        other = trainer(tmp_path / "b", merge_on_train_end=True)
        other.train()
        assert model_state(other.model) is None
        torch.testing.assert_close(logits(other.model), logits(run.model))
        other.save_model(tmp_path / "whole")
        again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "whole")
        assert torch.equal(logits(again), logits(other.model))

    def test_a_stored_base_becomes_dense(self, tmp_path):
        with pytest.raises(StateError, match=r"stored in fewer bytes.* dequantize=True.* merge_on_train_end=False"):
            trainer(tmp_path, model=(model := vit()), config=STORED, merge_on_train_end=True)
        assert not differing(values(model), values(vit()))
        LoraModel(model, STORED, "first")
        with pytest.raises(StateError, match="stored in fewer bytes"):
            trainer(tmp_path, model=model, config=VIT, merge_on_train_end=True)
        assert [*LoraModel(model).adapters] == ["first"]
        run = trainer(tmp_path / "a", config=STORED)
        run.train()
        other = trainer(tmp_path / "b", config=STORED, merge_on_train_end=True, dequantize=True)
        other.train()
        assert values(other.model).keys() == values(vit()).keys()
        torch.testing.assert_close(logits(other.model), logits(run.model))

    def test_what_rounding_may_lose_of_an_update(self, tmp_path):
        """A rate that moves little beside the rounding of weights in bfloat16."""
        options = {"merge_on_train_end": True, "learning_rate": 1e-6, "config": VIT}
        with pytest.raises(MergeError, match="max_error"):
            trainer(tmp_path / "a", vit().bfloat16(), **options).train()
        run = trainer(tmp_path / "b", vit().bfloat16(), max_error=1.0, **options)
        run.train()
        assert model_state(run.model) is None
        with pytest.raises(ConfigError, match=r"^max_error is a share, a number of at least 0, not -1"):
            trainer(tmp_path / "c", max_error=-1)

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of bitsandbytes
    @pytest.mark.filterwarnings("ignore::FutureWarning")
    @pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")
    @pytest.mark.parametrize("given", ["model", "model_init"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_a_model_that_bitsandbytes_quantized(self, tmp_path, bits, given):
        """The Trainer refuses such a model without adapters of PEFT; what is merged is saved as a dense one."""
        pytest.importorskip("bitsandbytes")
        vit().save_pretrained(tmp_path / "base")
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["classifier"]
        )
        kind = transformers.ViTForImageClassification

        def build():
            return kind.from_pretrained(tmp_path / "base", quantization_config=quantized)

        with pytest.raises(StateError, match="stored in fewer bytes"):
            trainer(tmp_path / "run", model := build(), merge_on_train_end=True)
        assert model_state(model) is None
        fields = {"model": model} if given == "model" else {"model_init": build}
        run = trainer(tmp_path / "run", merge_on_train_end=True, dequantize=True, **fields)
        run.train()
        other = build()
        LoraModel.load_adapter(other, tmp_path / "run" / "checkpoint-6").merge_and_unload(dequantize=True)
        assert not differing(values(other), values(run.model))
        run.save_model(tmp_path / "whole")
        assert torch.equal(logits(kind.from_pretrained(tmp_path / "whole")), logits(run.model))

    def test_a_weight_of_two_layers_is_refused_before_training(self, tmp_path):
        config = LoraConfig(r=2, target_modules=["hidden"])

        def tied():
            model = Centered()
            model.out = nn.Linear(192, 4)
            model.out.weight = model.hidden.weight
            return model

        with pytest.raises(MergeError, match=r"'hidden\.weight' is the same tensor as 'out\.weight'"):
            trainer(tmp_path, model := tied(), config, merge_on_train_end=True)
        assert model_state(model) is None
        trainer(tmp_path, model, config)

    def test_a_merged_model_is_not_trained_on(self, tmp_path):
        run = trainer(tmp_path, merge_on_train_end=True)
        run.train()
        with pytest.raises(StateError, match="merged or unloaded"):
            run.train()


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"label_smoothing_factor": 0.1}, id="label smoothing"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"activation_checkpointing": True}, id="checkpointing"),
        pytest.param({"bf16": True}, id="bf16"),
        pytest.param({"weight_decay": 0.1, "max_grad_norm": 0.5}, id="decay and clipping"),
        pytest.param({"optim": "sgd", "weight_decay": 0.1}, id="sgd"),
        pytest.param({"model_init": build_vit}, id="model_init"),
        pytest.param({"callbacks": [transformers.EarlyStoppingCallback(2)], **BEST}, id="early stopping"),
        pytest.param({"eval_on_start": True, "eval_strategy": "epoch"}, id="evaluation first"),
        pytest.param({"torch_compile": True, "torch_compile_backend": "eager"}, id="compiled"),
        pytest.param({"dataloader_drop_last": True, "eval_strategy": "steps", "eval_steps": 2}, id="evaluation"),
    ],
)
def test_what_the_trainer_can_do_it_does(tmp_path, fields):
    run = trainer(tmp_path, **fields)
    start = values(run.model)
    run.train()
    moved = differing(start, values(run.model))
    trained = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert sorted(moved) == sorted(trained)
    assert {name.rpartition(".lora_")[2] for name in moved if ".lora_" in name} == {"A.default", "B.default"}


def test_evaluation_and_prediction_see_the_adapter(tmp_path):
    run = trainer(
        tmp_path, compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())}
    )
    run.train()
    predicted = run.predict(images(6, seed=2))
    torch.testing.assert_close(torch.from_numpy(predicted.predictions), logits(run.model))
    assert run.evaluate()["eval_accuracy"] == predicted.metrics["test_accuracy"]


def test_it_learns_what_full_training_learns(tmp_path):
    run = trainer(tmp_path, num_train_epochs=20)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before / 2


class Plain(nn.Module):
    """A module of nobody's library, which returns a loss as the Trainer wants it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 3)

    def forward(self, pixel_values, labels=None):
        out = self.head(self.conv(pixel_values).relu().mean((2, 3)))
        return (
            {"loss": nn.functional.cross_entropy(out, labels), "logits": out} if labels is not None else {"logits": out}
        )


def test_any_module_that_the_trainer_takes(tmp_path):
    config = LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head"])
    run = trainer(tmp_path, Plain(), config, load_best_model_at_end=True, eval_strategy="epoch")
    run.train()
    again = Plain()
    LoraModel.load_adapter(again, run.state.best_model_checkpoint)
    assert not differing(values(again), values(run.model))


class Weighted(transformers.Trainer):
    """Somebody's own Trainer."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.asked = True
        return super().compute_loss(model, inputs, *args, **kwargs)


def test_beside_a_trainer_of_somebody_else(tmp_path):
    class Both(LoraTrainer, Weighted):
        pass

    run = Both(vit(), arguments(tmp_path), train_dataset=images(), lora_config=VIT)
    run.train()
    assert run.asked
    assert "adapter.json" in files(tmp_path / "checkpoint-6")


def test_beside_the_trainer_for_sequences(tmp_path):
    """Its evaluation is another one; best checkpoint and resuming are as ever."""

    class Both(LoraTrainer, transformers.Seq2SeqTrainer):
        pass

    def made(folder, **fields):
        args = arguments(folder, transformers.Seq2SeqTrainingArguments, **BEST, **fields)
        return Both(vit(), args, train_dataset=images(), eval_dataset=images(), lora_config=VIT)

    whole = made(tmp_path / "whole")
    whole.train()
    again = made(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert not differing(values(whole.model), values(again.model))
    assert whole.state.best_model_checkpoint


class Told(transformers.TrainerCallback):
    """Notes which events it is told of, and whether there was an optimizer."""

    def __init__(self):
        self.events = {}

    def on_init_end(self, args, state, control, **kwargs):
        self.events["init_end"] = kwargs.get("optimizer") is not None

    def on_train_begin(self, args, state, control, **kwargs):
        self.events["train_begin"] = kwargs["optimizer"] is not None


class TestWhyItIsNoCallback:
    """What docs/start/transformers.md says of the Trainer; if one of these fails, a callback may have become enough."""

    def test_a_checkpoint_without_a_model_is_refused_before_a_callback_is_told(self, tmp_path):
        trainer(tmp_path).train()
        told = Told()
        plain = transformers.Trainer(vit(), arguments(tmp_path), train_dataset=images(), callbacks=[told])
        with pytest.raises(ValueError, match="Can't find a valid checkpoint"):
            plain.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert told.events == {"init_end": False}

    def test_a_model_of_model_init_has_its_optimizer_before_a_callback_is_told(self, tmp_path):
        told = Told()
        plain = transformers.Trainer(
            args=arguments(tmp_path, max_steps=1), model_init=build_vit, train_dataset=images(), callbacks=[told]
        )
        first = plain.model
        plain.train()
        assert plain.model is not first
        assert told.events == {"init_end": False, "train_begin": True}


def test_the_callback_of_lightning_names_the_trainer(tmp_path):
    lightning = pytest.importorskip("lora_plugins.integrations.lightning")
    with pytest.raises(ConfigError, match=r"LoraTrainer\(model, args, ..., lora_config=config\)"):
        transformers.Trainer(vit(), arguments(tmp_path), callbacks=[lightning.LoraCallback(VIT)])


class TestCards:
    def test_without_a_hub_they_name_what_there_is(self, tmp_path):
        run = trainer(tmp_path / "flowers", eval_strategy="epoch")
        run.train()
        run.model.config._name_or_path = "owner/base"
        run.create_model_card(license="mit")
        card = (tmp_path / "flowers" / "README.md").read_text()
        assert all(text in card for text in ("license: mit", "base_model: owner/base", "# flowers", "| loss |"))
        assert LoraModel.load_adapter(vit(), tmp_path / "flowers").active_adapters == ("default",)

    @pytest.mark.parametrize("best", [False, True], ids=["last", "best"])
    def test_they_have_the_numbers_of_the_model_that_is_there(self, tmp_path, best):
        """On all sets; what compute_metrics returns can hold more than numbers, as that of mean IoU does."""
        seen = []

        def score(prediction):  # the first epoch is the best one
            seen.append(len(seen))
            return {"score": -float(len(seen)), "per_category": [0.5, 0.25]}

        fields = {"load_best_model_at_end": True, "metric_for_best_model": "one_score"} if best else {}
        args = arguments(tmp_path, eval_strategy="epoch", **fields)
        sets = {"train_dataset": images(), "eval_dataset": {"one": images(3), "two": images(3)}}
        run = LoraTrainer(vit(), args, **sets, lora_config=VIT, compute_metrics=score)
        run.train()
        first = 1 if best else 3
        run.create_model_card()
        card = (tmp_path / "README.md").read_text()
        assert f"| one_score | -{first} |" in card
        assert f"| two_score | -{first + 1} |" in card
        assert "per_category" not in card
        run.evaluate(images(3))
        run.create_model_card()
        assert "| score | -5 |" in (tmp_path / "README.md").read_text()

    def test_a_path_of_this_machine_is_no_name_of_a_base(self, tmp_path):
        run = trainer(tmp_path)
        run.model.config._name_or_path = str(tmp_path)
        run.create_model_card()
        assert str(tmp_path) not in (tmp_path / "README.md").read_text()

    def test_a_merged_model_has_that_of_the_trainer(self, tmp_path):
        run = trainer(tmp_path, merge_on_train_end=True)
        run.train()
        run.create_model_card()
        assert "Training procedure" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("name", ["default", "debiased", "layer_norm", "bias"])
def test_weight_decay_reaches_both_factors_of_an_adapter_of_any_name(tmp_path, name):
    run = LoraTrainer(vit(), arguments(tmp_path, weight_decay=0.1), lora_config=VIT, adapter_name=name)
    group, _ = run.create_optimizer().param_groups
    decayed = {id(parameter) for parameter in group["params"]}
    factors = [p for name, p in run.model.named_parameters() if ".lora_" in name]
    assert all(id(parameter) in decayed for parameter in factors)


def test_the_start_is_that_of_the_seed(tmp_path):
    one = trainer(tmp_path)
    torch.manual_seed(1234)
    other = trainer(tmp_path)
    assert not differing(values(one.model), values(other.model))


def test_it_prints_what_is_trained(tmp_path, capsys):
    run = trainer(tmp_path)
    run.train()
    assert f"LoRA adapter 'default': {LoraModel(run.model).plans['default'].summary()}" in capsys.readouterr().out


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


class TestModelsThatAreAdaptedAlready:
    def test_they_are_taken_as_they_are(self, tmp_path):
        model = vit()
        LoraModel(model, VIT, "mine")
        run = trainer(tmp_path, model, None, adapter_name="mine")
        run.train()
        again = vit()
        assert LoraModel.load_adapter(again, tmp_path / "checkpoint-6").active_adapters == ("mine",)
        assert not differing(values(again), values(model))

    def test_an_init_that_learns_from_data_is_resumed(self, tmp_path):
        def adapted():
            model = vit()
            batches = [{"pixel_values": torch.stack([each["pixel_values"] for each in images()])}]
            data = InitData(batches, step=lambda model, batch: model(**batch))
            LoraModel(model, LoraConfig(r=2, target_modules=["q_proj"], init="eva"), init_data=data)
            return model

        straight = trainer(tmp_path, adapted(), None)
        straight.train()
        resumed = trainer(tmp_path, adapted(), None)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not differing(values(straight.model), values(resumed.model))

    def test_one_that_was_loaded_goes_on(self, tmp_path):
        straight = trainer(tmp_path)
        straight.train()
        model = vit()
        LoraModel.load_adapter(model, tmp_path / "checkpoint-3")
        resumed = trainer(tmp_path, model, None)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not differing(values(straight.model), values(resumed.model))

    def test_a_second_trainer_goes_on_with_the_same_adapter(self, tmp_path):
        model = vit()
        trainer(tmp_path, model).train()
        trained = values(model)
        assert not differing(trained, values(trainer(tmp_path, model).model))

    def test_a_second_adapter_is_added_and_the_first_stays(self, tmp_path):
        model = vit()
        trainer(tmp_path / "a", model).train()
        first = {name: value for name, value in values(model).items() if name.endswith(".default")}
        trainer(tmp_path / "b", model, LoraConfig(r=1, target_modules=["q_proj"]), adapter_name="b").train()
        assert all(torch.equal(values(model)[name], value) for name, value in first.items())

    def test_of_another_configuration_they_are_refused(self, tmp_path):
        model = vit()
        LoraModel(model, LoraConfig(r=4, target_modules=["q_proj"]))
        with pytest.raises(StateError, match=r"another configuration: 'r', 'dropout'.* differ"):
            trainer(tmp_path, model)

    def test_without_an_adapter_one_is_asked_for(self, tmp_path):
        with pytest.raises(StateError, match=r"no adapter 'default'. Give LoraTrainer a lora_config"):
            trainer(tmp_path, config=None)

    def test_an_adapter_that_does_not_act_is_not_trained_in_silence(self, tmp_path):
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
    def test_what_no_training_and_no_checkpoint_would_reach(self, tmp_path, change, message):
        run = trainer(tmp_path, vit(), LoraConfig(r=2, target_modules=["q_proj"]))
        change(LoraModel(run.model))
        with pytest.raises(StateError, match=message):
            run.train()
        assert run.state.global_step == 0


class TestRefused:
    def test_a_config_by_place(self):
        with pytest.raises(ConfigError, match="has its config by name"):
            LoraTrainer(vit(), VIT)

    @pytest.mark.parametrize("argument", ["merge_on_train_end", "dequantize"])
    def test_a_word_that_is_no_flag(self, tmp_path, argument):
        with pytest.raises(ConfigError, match=f"^{argument} is True or False, not 'no'"):
            trainer(tmp_path, **{argument: "no"})

    def test_a_number_that_is_no_name(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^adapter_name holds 1, which is not a name"):
            trainer(tmp_path, adapter_name=1)

    def test_a_config_of_another_kind(self, tmp_path):
        with pytest.raises(ConfigError, match=r"^LoraTrainer: config is a dict"):
            trainer(tmp_path, config={"r": 4})

    def test_a_word_of_other_trainers(self, tmp_path):
        with pytest.raises(ConfigError, match="It is 'lora_config' here"):
            LoraTrainer(vit(), arguments(tmp_path), peft_config=VIT)

    def test_a_handle_in_place_of_the_model(self, tmp_path):
        with pytest.raises(AttributeError, match="It is a handle; the model itself has it"):
            trainer(tmp_path, LoraModel(vit(), VIT))

    def test_a_config_that_does_not_fit(self, tmp_path):
        with pytest.raises(TargetError, match="'qkv'"):
            trainer(tmp_path, config=LoraConfig(target_modules=["qkv"]))

    def test_an_optimizer_from_before(self, tmp_path):
        model = vit()
        optimizer = torch.optim.AdamW(model.parameters())
        with pytest.raises(StateError, match=r"optimizer does not hold A and B of.*Adapt the model before"):
            trainer(tmp_path, model, optimizers=(optimizer, None))
        assert model_state(model) is None
        assert all(parameter.requires_grad for parameter in model.parameters())
        LoraModel(model, VIT)  # as the message says
        with pytest.raises(StateError, match=r"optimizer does not hold '.*lora_.*Adapt the model before"):
            trainer(tmp_path, model, None, optimizers=(optimizer, None))

    def test_an_optimizer_from_after_is_taken(self, tmp_path):
        model = vit()
        LoraModel(model, VIT)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run = trainer(tmp_path, model, None, optimizers=(optimizer, None))
        start = values(model)
        run.train()
        assert differing(start, values(model))

    def test_what_no_checkpoint_would_hold(self, tmp_path):
        run = trainer(tmp_path)
        run.model.vit.layernorm.weight.requires_grad_(True)
        with pytest.raises(StateError, match=r"'vit\.layernorm\.weight' are trained and are no part of the adapter"):
            run.train()

    def test_a_buffer_that_no_checkpoint_would_hold(self, tmp_path):
        run = trainer(tmp_path, Centered(), CENTERED)
        with pytest.raises(StateError, match=r"Training changes 'center\.mean', buffers .* Name their modules"):
            run.train()
        assert run.state.global_step == 0
        assert not list(tmp_path.glob("checkpoint-*"))

    # the checkpoint is written before `on_save` refuses the run, and warns of the same
    @pytest.mark.filterwarnings("ignore:The adapter does not hold .center.mean.:UserWarning")
    @pytest.mark.parametrize(("event", "steps"), [("on_evaluate", 3), ("on_train_end", 6)])
    def test_a_buffer_that_changes_late(self, tmp_path, event, steps):
        def changed(callback, args, state, control, model, **kwargs):
            model.center.mean.add_(1)

        model = Centered()
        model.center.momentum = 0.0
        callback = type("Callback", (transformers.TrainerCallback,), {event: changed})()
        run = trainer(tmp_path, model, CENTERED, eval_strategy="epoch", callbacks=[callback])
        with pytest.raises(StateError, match=r"Training changes 'center\.mean'"):
            run.train()
        assert run.state.global_step == steps

    def test_a_buffer_that_need_not_be_kept(self, tmp_path):
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
            pytest.param(
                lambda model: model.vit.layernorm.requires_grad_(True), "no part of the adapter", id="unfrozen"
            ),
            pytest.param(lambda model: LoraModel(model).set_adapter("other"), "'other' is active", id="switched"),
            pytest.param(lambda model: LoraModel(model).merge_adapter(), "is merged", id="merged"),
        ],
    )
    def test_what_a_callback_changes_while_it_trains(self, tmp_path, event, change, message):
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
    def test_reentrant_checkpointing_that_cuts_the_backward(self, tmp_path):
        kwargs = {"use_reentrant": True}
        run = trainer(tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs=kwargs)
        with pytest.raises(StateError, match="use_reentrant=False is right"):
            run.train()

    def test_a_layer_that_takes_no_part_is_told(self, tmp_path):
        run = trainer(tmp_path)
        run.model.vit.layers[0].register_forward_hook(lambda _, inputs, output: output.detach())
        with pytest.warns(
            UserWarning, match=r"layers\.0\.attention\.q_proj\.lora_A.* got no gradient in the first step"
        ):
            run.train()

    def test_a_backward_that_passes_the_adapter_by(self, tmp_path):
        run = trainer(tmp_path)
        run.model.classifier.register_forward_pre_hook(lambda _, inputs: (inputs[0].detach(),))
        with pytest.raises(StateError, match="gave the adapter no gradient"):
            run.train()
