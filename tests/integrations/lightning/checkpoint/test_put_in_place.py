"""What a module puts in the place of its own weights, before training or in it: checkpoints hold it."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_plugins import LoraConfig
from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values

# Lightning's own: of a teacher in eval mode, and of a run that goes on in another folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def teacher(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).requires_grad_(False).eval()


class Downloaded(Classifier):
    """Loads its teacher when training starts."""

    def __init__(self):
        super().__init__()
        self.teacher = teacher(5)

    def on_train_start(self):
        self.teacher.load_state_dict(teacher(6).state_dict())

    def _step(self, batch, stage):
        loss = nn.functional.mse_loss(self(batch[0]), self.teacher(batch[0]))
        self.log(f"{stage}/loss", loss, on_step=False, on_epoch=True)
        return loss


class WholeModule(Downloaded):
    def on_train_start(self):
        self.load_state_dict({f"teacher.{key}": value for key, value in teacher(6).state_dict().items()}, strict=False)


def fitted(tmp_path, module, config, name, **options):
    torch.manual_seed(1)
    saver = ModelCheckpoint(tmp_path / name, "{epoch}", save_top_k=-1)
    run = trainer(tmp_path, [lora(config), saver])
    run.fit(module, loader(), loader(), **options)
    return module, run


@pytest.mark.parametrize("cls", [Downloaded, WholeModule])
@pytest.mark.filterwarnings("ignore:.*got no gradient")  # adapters of a teacher
def test_a_teacher_that_is_loaded_before_training_though_it_is_adapted(tmp_path, cls):
    """EfficientAd of anomalib does so."""
    config = LoraConfig(r=2)
    module, run = fitted(tmp_path, cls(), config, "whole")
    path = tmp_path / "whole" / "epoch=1.ckpt"
    assert not differing(values(load_from_checkpoint(cls, path)), values(module))
    fresh = trainer(tmp_path, [lora(config)]).validate(cls(), loader(), ckpt_path=path, verbose=False)
    assert fresh == run.validate(module, loader(), verbose=False)
    resumed, _ = fitted(tmp_path, cls(), config, "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert not differing(values(resumed), values(module))


class Results(Classifier):
    """Keeps results as parameters, and puts new ones in their place, as anomalib does."""

    def __init__(self):
        super().__init__()
        self.results = nn.ParameterDict({"mean": torch.zeros(3)})

    def on_validation_start(self):
        self.results.update({"mean": self(next(iter(loader()))[0]).mean(0).detach()})

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=self.lr)


def test_results_in_the_place_of_parameters(tmp_path):
    module, _ = fitted(tmp_path, Results(), LoraConfig(r=2), "run")
    saved = load(tmp_path / "run" / "epoch=1.ckpt")["state_dict"]
    assert module.results["mean"].any()
    assert torch.equal(saved["results.mean"], module.results["mean"])
    assert not differing(values(load_from_checkpoint(Results, tmp_path / "run" / "epoch=1.ckpt")), values(module))
