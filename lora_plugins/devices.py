"""Devices that torch can use here."""

import torch

from lora_plugins.errors import ConfigError


def default_device() -> torch.device:
    """Returns the accelerator that torch finds, of whatever kind, or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def usable_device(device: str | torch.device | None, named: str = "device") -> torch.device:
    """Returns a device.

    Args:
        device: The device, or its name; None for the default.
        named: Where it was named, for the message.

    Raises:
        ConfigError: If torch cannot use it here, so that nothing else is blamed for that.
    """
    device = default_device() if device is None else device
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except Exception as error:  # each backend raises its own
        reason = str(error).partition("\n")[0]
        told = f"{named} is {str(device)!r}, which torch cannot use here: {reason}"
        raise ConfigError(f"{told.removesuffix('.')}. Leave it out, or take cpu.") from error
