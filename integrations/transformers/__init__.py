"""LoRA in the `Trainer` of transformers: adapted before the optimizer is made, checkpoints that hold the adapter alone.

    LoraTrainer(model, args, train_dataset=images, lora_config=LoraConfig(r=8, target_modules=["q_proj"])).train()

It is a Trainer, not a callback of one: a callback learns of a checkpoint when the whole model has been written, and is
not asked when one is read; docs/start/transformers.md names the places. It stands before any other class of trainers:
`class Mine(LoraTrainer, Seq2SeqTrainer)`.
"""

from typing import TYPE_CHECKING

from lora_plugins.lazy import lazily

if TYPE_CHECKING:
    from lora_plugins.integrations.transformers.trainer import LoraTrainer

__all__ = ["LoraTrainer"]

__getattr__, __dir__ = lazily(__name__, {"LoraTrainer": "trainer"}, extra="transformers")
