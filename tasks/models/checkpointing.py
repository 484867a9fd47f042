"""Gradient checkpointing: activations are computed again in the backward, one block at a time, and not kept."""

from typing import Any

from torch import nn

from lora_plugins import ConfigError


def enable_checkpointing(network: nn.Module) -> None:
    """Lets a network of timm or transformers keep its activations block by block only.

    Raises:
        ConfigError: If it is of another library, or its blocks cannot be computed again.
    """
    module: Any = network
    name = type(network).__name__
    try:
        if hasattr(module, "set_grad_checkpointing"):  # timm
            module.set_grad_checkpointing(True)
        elif getattr(module, "supports_gradient_checkpointing", False):  # transformers
            module.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            raise ConfigError(
                f"gradient_checkpointing: {name} cannot compute its blocks again. Networks of timm and most of "
                "transformers can; set it to false for this one."
            )
    except ConfigError:
        raise
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ConfigError(f"gradient_checkpointing: {name} refuses it: {error}") from error
