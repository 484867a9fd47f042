"""Optimizer states in 8 bits, of other libraries, on a stored base: resuming goes on bit for bit."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.integrations.lightning.toys import CONFIG, Classifier, differing, loader, lora, trainer, values

NF4 = replace(CONFIG, r=8, quantize="nf4", quantize_options={"min_size": 0})


class Wide(Classifier):
    """As wide as it takes for a factor that is large enough to be stored in 8 bits: 4096 elements."""

    def __init__(self):
        super().__init__(width=1024, lr=0.01)

    def configure_optimizers(self):
        return self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad], lr=self.lr)


def fitted(optimizer, folder, epochs, path=None):
    module = Wide()
    module.optimizer = optimizer
    saver = ModelCheckpoint(folder, filename=f"{epochs}")
    run = trainer(folder, [lora(NF4, print_plan=False), saver], max_epochs=epochs)
    run.fit(module, loader(), loader(), ckpt_path=path)
    return run, module, folder / f"{epochs}.ckpt"


@pytest.mark.parametrize("library", ["bitsandbytes.optim", "torchao.optim"])
@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")  # inside of the libraries
def test_resumed_is_straight(library, tmp_path):
    optimizer = pytest.importorskip(library).AdamW8bit
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes longer than all of this
        run, straight, _ = fitted(optimizer, tmp_path, 4)
        _, half, path = fitted(optimizer, tmp_path, 2)
        _, resumed, _ = fitted(optimizer, tmp_path, 4, path)
    states = [value for state in run.optimizers[0].state.values() for value in state.values()]
    assert any(
        isinstance(value, torch.Tensor) and (value.dtype == torch.uint8 or hasattr(value, "codes")) for value in states
    )
    assert differing(values(half), values(straight))
    assert not differing(values(resumed), values(straight))
