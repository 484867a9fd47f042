"""Training in float16 with an optimizer whose eps is 0 in that type."""

import dataclasses

import pytest
import torch

from lora_plugins import MergeError
from tests.integrations.lightning.toys import CONFIG, Classifier, loader, lora, trainer

HEAD = dataclasses.replace(CONFIG, target_modules=["net.0"], modules_to_save=["net.3"])


class SmallGradients(Classifier):
    """Its gradients have a square of 0 in float16."""

    def __init__(self, eps: float):
        super().__init__()
        self.eps = eps

    def training_step(self, batch, index):
        images, labels = batch
        return super().training_step((images.to(self.dtype), labels), index) * 1e-4

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3, eps=self.eps)


def fitted(folder, precision, eps):
    run = trainer(folder, [lora(HEAD, merge_on_fit_end=True)], precision=precision)
    module = SmallGradients(eps)
    run.fit(module, loader())
    return module


def test_the_cause_is_said_in_the_first_steps(tmp_path):
    said = r"'net\.3\.weight'.* eps=1e-08 of AdamW is 0 in float16.*16-mixed"
    with pytest.warns(UserWarning, match=said) as warned, pytest.raises(MergeError, match="not finite"):
        fitted(tmp_path, "16-true", 1e-8)
    assert len([each for each in warned if "float16" in str(each.message)]) == 1


@pytest.mark.parametrize(
    ("precision", "eps"),
    [("16-true", 1e-4), ("bf16-true", 1e-8), ("32-true", 1e-8)],
    ids=["eps", "bfloat16", "float32"],
)
def test_nothing_is_said_where_it_is_not_lost(tmp_path, precision, eps):
    module = fitted(tmp_path, precision, eps)
    assert all(bool(each.isfinite().all()) for each in module.parameters())
