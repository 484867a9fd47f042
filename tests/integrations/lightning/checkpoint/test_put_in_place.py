"""What a module puts in the place of its own weights, before training or in it: checkpoints hold it."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig
from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values

# Lightning's own: of a teacher in eval mode, and of a run that goes on in another folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


def teacher(seed):
    with torch.random.fork_rng(devices=[]):
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
@pytest.mark.filterwarnings("ignore:'teacher' arrived frozen")  # it has adapters
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


@pytest.mark.parametrize(
    "normalize",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.weight_norm],
    ids=["hook", "parametrization", "weight norm"],
)
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
def test_weights_that_a_hook_or_a_parametrization_computes(tmp_path, normalize):
    """Statistics of spectral norm move in training, and a hook sets a weight at the next forward only."""

    class Normalized(Classifier):
        def __init__(self, seed=2):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                self.net[0], self.net[3] = normalize(nn.Linear(4, 16)), normalize(nn.Linear(16, 3))
            if normalize is nn.utils.weight_norm:  # as in the heads of DINO
                self.net[3].weight_g.data.fill_(1)

        def save_hyperparameters(self, *_):
            """Those of the toy are not its own."""

    config = LoraConfig(r=2)
    module, run = fitted(tmp_path, Normalized(), config, "whole")
    path = tmp_path / "whole" / "epoch=1.ckpt"
    fresh = trainer(tmp_path, [lora(config)]).validate(Normalized(), loader(), ckpt_path=path, verbose=False)
    assert fresh == run.validate(module, loader(), verbose=False)
    assert not differing(values(load_from_checkpoint(Normalized, path)), values(module))
    resumed, _ = fitted(tmp_path, Normalized(), config, "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert not differing(values(resumed), values(module))
    with pytest.raises(AdapterFileError, match="another base"):
        load_from_checkpoint(Normalized, path, seed=3)


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["new", "old"])
@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*got no gradient")
def test_a_moved_teacher_with_weight_norm(tmp_path, normalize):
    """As the head of DINO's teacher, which is no copy of the student's."""

    class Teacher(Classifier):
        def __init__(self):
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(5)
                self.student, self.teacher = (nn.Sequential(normalize(nn.Linear(4, 3))) for _ in range(2))
            self.teacher.requires_grad_(False)

        def training_step(self, batch, _):
            with torch.no_grad():
                for own, its in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                    own.lerp_(its, 0.1)
            return nn.functional.mse_loss(self.student(batch[0]), self.teacher(batch[0]) + self(batch[0]))

    config = LoraConfig(r=2)
    module, _ = fitted(tmp_path, Teacher(), config, "whole")
    assert not differing(values(load_from_checkpoint(Teacher, tmp_path / "whole" / "epoch=1.ckpt")), values(module))
    resumed, _ = fitted(tmp_path, Teacher(), config, "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert not differing(values(resumed), values(module))
