"""Devices that torch can use here."""

import torch

from lora_plugins.errors import ConfigError


def usable_device(device: str | torch.device, named: str = "device") -> torch.device:
    """Returns a device.

    Args:
        device: The device, or its name.
        named: Where it was named, for the message.

    Raises:
        ConfigError: If torch cannot use it here, so that nothing else is blamed for that.
    """
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except Exception as error:  # each backend raises its own
        reason = str(error).partition("\n")[0]
        told = f"{named} is {str(device)!r}, which torch cannot use here: {reason}"
        raise ConfigError(f"{told.removesuffix('.')}. Leave it out, or take cpu.") from error
