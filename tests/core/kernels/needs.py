"""Kernels may be deleted, switched off, or not made for this machine: tests that need one are skipped there."""

import pytest

from lora_plugins.kernels import kernel_report


def needs(*names: str) -> pytest.MarkDecorator:
    """Marks tests that are about some kernels themselves."""
    reasons = {status.name: status.reason for status in kernel_report()}
    missing = [f"{name}: {reason}" for name in names if (reason := reasons.get(name, "deleted"))]
    return pytest.mark.skipif(bool(missing), reason=f"needs kernels that are not used here ({'; '.join(missing)})")
