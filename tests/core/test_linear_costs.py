"""What is done once costs as much for each layer in a large model as in a small one: calls are counted, not timed."""

import re

import pytest
import torch

from lora_plugins import LoraConfig, LoraModel
from tests.growth import EACH_BLOCK, Blocks, assert_linear
from tests.slow import slow_but


def paths(size, step=1, start=0):
    return [f"blocks.{at}.0" for at in range(start, size, step)]


CONFIGS = {
    "an expression": lambda size: LoraConfig(r=2, target_modules=EACH_BLOCK),
    "all": lambda size: LoraConfig(r=2, target_modules="all"),
    "a list of layers": lambda size: LoraConfig(r=2, target_modules=paths(size)),
    "excluded layers": lambda size: LoraConfig(r=2, target_modules="all", exclude_modules=paths(size, 2)),
    "blocks": lambda size: LoraConfig(r=2, target_modules="all", layers_to_transform=list(range(size))),
    "blocks by their paths": lambda size: LoraConfig(
        r=2, target_modules="all", layers_to_transform=[f"blocks.{at}" for at in range(size)]
    ),
    "ranks and alphas": lambda size: LoraConfig(
        r=2,
        target_modules=EACH_BLOCK,
        rank_pattern=dict.fromkeys(paths(size, 2), 3),
        alpha_pattern=dict.fromkeys(paths(size), 4.0),
    ),
    "layers trained in full": lambda size: LoraConfig(
        r=2, target_modules=paths(size, 2), modules_to_save=paths(size, 2, 1)
    ),
    "biases": lambda size: LoraConfig(r=2, target_modules=EACH_BLOCK, bias="all"),
    "a changed base": lambda size: LoraConfig(r=2, target_modules=EACH_BLOCK, init="pissa"),
    "DoRA": lambda size: LoraConfig(r=2, target_modules=EACH_BLOCK, variant="dora"),
    "stored bases": lambda size: LoraConfig(
        r=2, target_modules=EACH_BLOCK, quantize="int8", quantize_modules=paths(size), quantize_options={"min_size": 0}
    ),
}


OFTEN = ("all", "DoRA", "stored bases")


@pytest.mark.parametrize("kind", slow_but(CONFIGS, OFTEN))
def test_an_adapter(kind, tmp_path):
    def steps(size):
        model, folder, for_peft = Blocks(size), tmp_path / str(size), tmp_path / f"{size}-peft"
        config = CONFIGS[kind](size)
        made: list[LoraModel] = []

        def load(path):
            return lambda: LoraModel.load_adapter(Blocks(size), path)

        def call(method, *given, **named):
            return lambda: getattr(made[0], method)(*given, **named)

        exchange = {
            "save for PEFT": call("save_adapter", for_peft, adapter_name="default", format="peft"),
            "load from PEFT": load(for_peft),
        }
        return {
            "plan": lambda: LoraModel.plan(model, config),
            "inject": lambda: made.append(LoraModel(model, config)),
            "pack": call("pack", "default"),
            "save": call("save_adapter", folder),
            "load": load(folder),
            **(exchange if config.quantize is None else {}),
            **({"swap": call("swap_adapter", "default", folder)} if config.init == "kaiming" else {}),
            **({"merge": call("merge_adapter"), "unmerge": call("unmerge_adapter")} if config.quantize is None else {}),
            "merge for good": call("merge_and_unload", dequantize=True),
        }

    assert_linear(steps)


def test_several_adapters(tmp_path):
    def steps(size):
        model, folder = Blocks(size), tmp_path / str(size)
        lora = LoraModel(model, CONFIGS["an expression"](size))

        def switch():
            with lora.disable_adapter(), torch.no_grad():
                pass
            with lora.mixed_batch(["default", "other", None]):
                pass

        def combine(kind, **options):
            return lambda: lora.add_weighted_adapter(
                ["default", "other"], [0.5, 0.5], kind, combination_type=kind, **options
            )

        return {
            "add": lambda: lora.add_adapter("other", CONFIGS["ranks and alphas"](size)),
            "activate": lambda: lora.set_adapter(["default", "other"]),
            "switch": switch,
            "cat": combine("cat"),
            "svd": combine("svd"),
            "ties": combine("ties", density=0.5),
            "save a combination": lambda: lora.save_adapter(folder, adapter_name="cat"),
            "load a combination": lambda: LoraModel.load_adapter(model, folder, "again"),
            "delete": lambda: lora.delete_adapter("other"),
            "print": lambda: (lora.print_trainable_parameters(), str(lora.plans["default"]), repr(lora)),
        }

    assert_linear(steps)


@pytest.mark.parametrize("wrong", ["blocks.0.1.weight", "block.0.0", re.escape("blocks.0.") + "9"])
def test_what_is_said_of_a_wrong_name(wrong):
    def steps(size):
        model = Blocks(size)

        def refused():
            with pytest.raises(Exception, match="target_modules"):
                LoraModel(model, LoraConfig(r=2, target_modules=[wrong]))

        return {"refuse": refused}

    assert_linear(steps)
