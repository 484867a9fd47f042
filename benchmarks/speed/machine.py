"""What a result was measured on."""

import platform
from importlib import metadata, util
from pathlib import Path

import torch

_UNITS = {"amx_tile": "AMX", "avx512f": "AVX-512", "avx2": "AVX2"}
"""Of Linux's names of what a processor has, those that products of matrices depend on."""


def machine(device: torch.device) -> dict[str, object]:
    """Returns the names of processor and card, the threads, and the versions of torch and PEFT."""
    return {
        "processor": _processor(),
        "card": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__.partition("+")[0],
        "peft": metadata.version("peft") if util.find_spec("peft") else "",
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    if not file.is_file():
        return platform.processor()
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in lines.items()}
    flags = facts.get("flags", "").split()
    has = [name for flag, name in _UNITS.items() if flag in flags]
    # The name alone may be that of several generations: Zen 4 is family 25, Zen 5 family 26.
    generation = f"family {facts.get('cpu family', '?')}, model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.machine())} ({', '.join([generation, *has])})"
