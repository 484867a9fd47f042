"""`LoraTrainer`: real runs of the Trainer of transformers on small models."""

import re

import pytest
import torch
import transformers
from torch import nn

from lora_plugins import ConfigError, InitData, LoraConfig, LoraModel, MergeError, StateError, TargetError
from lora_plugins.adapter import model_state
from lora_plugins.integrations.transformers import LoraTrainer
from lora_plugins.testing.full_disk import no_file_beyond
from tests.integrations.transformers.toys import (
    BEST,
    SEGFORMER,
    STORED,
    VIT,
    Centered,
    arguments,
    build_vit,
    differing,
    files,
    images,
    logits,
    scenes,
    segformer,
    trainer,
    values,
    vit,
)


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

    def test_a_full_disk_keeps_the_earlier_arguments(self, tmp_path):
        run = trainer(tmp_path / "run")
        LoraModel(run.model).save_adapter(tmp_path / "final")  # written again, it is what it was
        (tmp_path / "final" / "training_args.bin").write_bytes(b"before")
        before = {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()}
        size = max(map(len, before.values()))
        run.args.run_name = "x" * size
        with no_file_beyond(size), pytest.raises(OSError, match=r"File too large: .*/final/training_args\.bin"):
            run.save_model(tmp_path / "final")
        assert {path.name: path.read_bytes() for path in (tmp_path / "final").iterdir()} == before

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


@pytest.mark.parametrize("name", ["default", "debiased", "layer_norm", "bias"])
def test_weight_decay_reaches_both_factors_of_an_adapter_of_any_name(tmp_path, name):
    run = LoraTrainer(vit(), arguments(tmp_path, weight_decay=0.1), lora_config=VIT, adapter_name=name)
    group, _ = run.create_optimizer().param_groups
    decayed = {id(parameter) for parameter in group["params"]}
    factors = [p for name, p in run.model.named_parameters() if ".lora_" in name]
    assert all(id(parameter) in decayed for parameter in factors)


class Scaled(Plain):
    """Has a parameter beside its layers."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_what_an_adapter_is_called_decays_no_bias_of_the_model(tmp_path):
    config = LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head", "scale"])
    run = LoraTrainer(Scaled(), arguments(tmp_path, weight_decay=0.1), lora_config=config, adapter_name="bias")
    group, rest = run.create_optimizer().param_groups
    assert {id(parameter) for parameter in rest["params"]} == {id(run.model.head.bias)}
    assert any(parameter is run.model.scale for parameter in group["params"])


def test_the_start_is_that_of_the_seed(tmp_path):
    one = trainer(tmp_path)
    torch.manual_seed(1234)
    other = trainer(tmp_path)
    assert not differing(values(one.model), values(other.model))


def test_it_prints_what_is_trained(tmp_path, capsys):
    run = trainer(tmp_path)
    run.train()
    assert f"LoRA adapter 'default': {LoraModel(run.model).plans['default'].summary()}" in capsys.readouterr().out


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


class TestRefused:
    def test_a_config_by_place(self):
        with pytest.raises(ConfigError, match="has its config by name"):
            LoraTrainer(vit(), VIT)

    @pytest.mark.parametrize("argument", ["merge_on_train_end", "dequantize"])
    def test_a_word_that_is_no_flag(self, tmp_path, argument):
        with pytest.raises(ConfigError, match=f"^{argument} is True or False, not 'no'"):
            trainer(tmp_path, **{argument: "no"})

    def test_dense_weights_without_a_merge(self, tmp_path):
        """Nothing would be made dense."""
        model = vit()
        with pytest.raises(ConfigError, match=r"^dequantize=True.*merge_on_train_end=True"):
            trainer(tmp_path, model, dequantize=True)
        assert model_state(model) is None

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

    @pytest.mark.parametrize("name", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
    def test_an_optimizer_that_steps_within_the_backward(self, tmp_path, name):
        model = vit()
        with pytest.raises(StateError, match=rf"^optim='{name}' changes tensors within the backward.*'adamw_torch'"):
            trainer(tmp_path, model, optim=name)
        assert model_state(model) is None

    def test_an_optimizer_from_after_is_taken(self, tmp_path):
        model = vit()
        LoraModel(model, VIT)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        run = trainer(tmp_path, model, None, optimizers=(optimizer, None))
        start = values(model)
        run.train()
        assert differing(start, values(model))
