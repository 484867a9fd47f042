"""A warning of Lightning 2.6.6 about what this integration does on purpose, and only that."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule

from lora_plugins.inplace import is_frozen


@contextmanager
def expecting_eval_mode(module: LightningModule) -> Iterator[None]:
    """Silences the warning of modules in eval mode, if all of them are frozen normalization layers or parts of one.

    timm's have an activation inside.
    """
    in_eval = [child for child in module.modules() if not child.training]
    frozen = {part for child in in_eval if is_frozen(child) for part in child.modules()}
    with warnings.catch_warnings():
        if in_eval and frozen.issuperset(in_eval):
            warnings.filterwarnings("ignore", message=rf"Found {len(in_eval)} module\(s\) in eval mode at the start")
        yield
