"""The peak of a step: in the allocator of torch, and of the process."""

import ctypes
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

STATUS, PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def allocator_peak(step: Callable[[], object], device: torch.device) -> int:
    """Returns the most bytes that a step has in torch's allocator beyond what is there before it."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak


def process_peak(step: Callable[[], object]) -> int | None:
    """Returns by how many bytes a step makes the process grow at most; None where the system does not tell."""
    if not sys.platform.startswith("linux"):
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what the steps before left would hide it
    PEAK.write_text("5")  # sets the peak to what there is now
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 2**10
