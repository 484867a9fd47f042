"""Frozen parts outside of the target: left out of files while they are as they were built, and exact always."""

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss

from lora_plugins import AdapterFileError, LoraConfig
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, trainer, values

# Lightning's own: of a teacher in eval mode, and of a run that goes on in another folder.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Found .* module\\(s\\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]

CONFIG = LoraConfig(r=2, target_modules=["0", "3"])


class Parts(Classifier):
    """A student, a frozen teacher of another shape, a projection that is trained, and a part without parameters."""

    def __init__(self, teacher_seed=5, move=None, norm=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(teacher_seed)
            self.teacher = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).requires_grad_(False)
            self.projection = nn.Linear(3, 3)
        self.teacher.eval()
        self.move = move
        self.register_buffer("seen", torch.zeros(1))
        self.teacher.register_buffer("ticks", torch.zeros((), dtype=torch.long))

    def save_hyperparameters(self, *_):
        """A function is no hyperparameter."""

    def training_step(self, batch, batch_idx):
        if self.move is not None:
            self.move(self)
        self.seen += 1
        return mse_loss(self.projection(self(batch[0])), self.teacher(batch[0]))

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


@torch.no_grad()
def by_hand(module):
    module.teacher[0].weight.data.mul_(0.99)


def tick(module):
    module.teacher.ticks += 1


def train_mode(module):
    module.teacher.train()


def late(module):
    if module.current_epoch >= 1:
        by_hand(module)


def replaced(module):
    module.teacher[0].weight.data = module.teacher[0].weight.data.clone()


STATISTICS = {f"teacher.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
MOVES = {
    "still": (None, set()),
    "same_values": (replaced, set()),
    "by_hand": (by_hand, {"teacher.0.weight"}),
    "statistics": (train_mode, STATISTICS),
    "buffer": (tick, {"teacher.ticks"}),
}
moves = pytest.mark.parametrize(("move", "kept"), list(MOVES.values()), ids=list(MOVES))
TEACHER = {key for key in Parts().state_dict() if key.startswith("teacher.")}


def lora(**options):
    return LoraCallback(CONFIG, target="net", print_plan=False, **{"merge_on_fit_end": False, **options})


def fitted(tmp_path, module, epochs=2, name="run", callbacks=(), given=None, **options):
    torch.manual_seed(1)
    saver = ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, [lora(), saver, *callbacks], max_epochs=epochs, **options)
    run.fit(module, loader(), loader(), **(given or {}))
    return run


@moves
class TestExact:
    def test_file_has_what_changed_and_no_more(self, tmp_path, move, kept):
        module = Parts(move=move)
        run = fitted(tmp_path, module)
        run.save_checkpoint(tmp_path / "after.ckpt")
        for path in (tmp_path / "run" / "epoch=1.ckpt", tmp_path / "after.ckpt"):
            saved = set(load(path)["state_dict"])
            assert saved & TEACHER == kept
            assert {"projection.weight", "projection.bias", "seen"} <= saved
            loaded = load_from_checkpoint(Parts, path)
            assert not differing(values(loaded), values(module))

    def test_resumes_bit_for_bit(self, tmp_path, move, kept):
        straight = Parts(move=move)
        fitted(tmp_path, straight, 4)
        resumed = Parts(move=move)
        fitted(tmp_path, resumed, 4, "resumed", given={"ckpt_path": tmp_path / "run" / "epoch=1.ckpt"})
        assert not differing(values(resumed), values(straight))
        assert set(load(tmp_path / "resumed" / "epoch=3.ckpt")["state_dict"]) & TEACHER == kept

    def test_validates_in_a_fresh_module(self, tmp_path, move, kept):
        module = Parts(move=move)
        fitted(tmp_path, module)
        fresh = Parts(move=move)
        trainer(tmp_path, [lora()]).validate(
            fresh, loader(), ckpt_path=tmp_path / "run" / "epoch=1.ckpt", verbose=False
        )
        assert not differing(values(fresh), values(module))

    def test_fits_again_what_was_loaded(self, tmp_path, move, kept):
        """Values that came with a file are none that the module is built with."""
        module = Parts(move=move)
        fitted(tmp_path, module)
        loaded = load_from_checkpoint(Parts, tmp_path / "run" / "epoch=1.ckpt")
        fitted(tmp_path, loaded, 1, "again")
        again = load_from_checkpoint(Parts, tmp_path / "again" / "epoch=0.ckpt")
        assert not differing(values(again), values(loaded))

    def test_second_fit_of_a_merged_module(self, tmp_path, move, kept):
        module, callback = Parts(move=move), lora(merge_on_fit_end=True)
        trainer(tmp_path, [callback]).fit(module, loader())
        saver = ModelCheckpoint(tmp_path, filename="second")
        run = trainer(tmp_path, [callback, saver], max_epochs=1)
        module.move = None
        run.fit(module, loader(), loader())
        assert set(load(tmp_path / "second.ckpt")["state_dict"]) & TEACHER >= kept
        again = load_from_checkpoint(Parts, tmp_path / "second.ckpt")
        assert not {key for key in differing(values(again), values(module)) if not key.startswith("net.")}


def test_moved_late_is_in_the_files_from_then_on(tmp_path):
    module = Parts(move=late)
    fitted(tmp_path, module, 3)
    kept = [set(load(tmp_path / "run" / f"epoch={epoch}.ckpt")["state_dict"]) & TEACHER for epoch in range(3)]
    assert kept == [set(), {"teacher.0.weight"}, {"teacher.0.weight"}]
    with pytest.warns(UserWarning, match=r"'teacher\.0\.weight'.*other values there"):
        trainer(tmp_path, [lora()]).validate(module, loader(), ckpt_path=tmp_path / "run" / "epoch=0.ckpt")


@pytest.mark.parametrize("target", [None, "net"], ids=["in_the_target", "beside_it"])
def test_a_checkpoint_from_before_the_first_move_is_refused_and_the_best_is_taken_with_a_word(tmp_path, target):
    class Best(Parts):
        def validation_step(self, batch, batch_idx):
            self.log("epoch", float(self.current_epoch))

    module = Best(move=late)
    inside = LoraConfig(r=2, target_modules=["net.0", "net.3"], modules_to_save=["projection"])
    config = CONFIG if target else inside
    callback = LoraCallback(config, target=target, merge_source="best", merge_on_fit_end=False)
    saver = ModelCheckpoint(tmp_path, monitor="epoch", filename="best")
    with pytest.warns(UserWarning, match=r"moved 'teacher\.0\.weight' by hand.* They are kept") as warned:
        trainer(tmp_path, [callback, saver]).fit(module, loader(), loader())
    assert len([each for each in warned if "by hand" in str(each.message)]) == 1
    with torch.no_grad():
        module.net[0].lora_B["default"].add_(1)
    last = values(module)
    run = trainer(tmp_path, [LoraCallback(config, target=target)])
    with pytest.raises(AdapterFileError, match=r"before this Best moved 'teacher\.0\.weight'.*into a new module"):
        run.fit(module, loader(), ckpt_path=tmp_path / "best.ckpt")
    assert not differing(values(module), last)
    with pytest.warns(UserWarning, match=r"moved 'teacher\.0\.weight' by hand.* They are kept"):
        run.validate(module, loader(), ckpt_path=tmp_path / "best.ckpt")
    run.validate(Best(), loader(), ckpt_path=tmp_path / "best.ckpt")


def test_other_values_are_refused(tmp_path):
    fitted(tmp_path, Parts())
    path = tmp_path / "run" / "epoch=1.ckpt"
    with pytest.raises(AdapterFileError, match=r"leaves 'teacher\.0\.weight'.*or the same seed"):
        load_from_checkpoint(Parts, path, teacher_seed=6)
    module = Parts(teacher_seed=6)
    fitted(tmp_path, module, 1, "other")
    before = values(module)
    with pytest.raises(AdapterFileError, match=r"leaves 'teacher\.0\.weight'"):
        trainer(tmp_path, [lora()]).validate(module, loader(), ckpt_path=path)
    assert not differing(values(module), before)


def test_changed_since_it_was_loaded_is_in_the_files(tmp_path):
    fitted(tmp_path, Parts())
    module = load_from_checkpoint(Parts, tmp_path / "run" / "epoch=1.ckpt")
    by_hand(module)
    fitted(tmp_path, module, 1, "again")
    path = tmp_path / "again" / "epoch=0.ckpt"
    assert set(load(path)["state_dict"]) & TEACHER == {"teacher.0.weight"}
    assert not differing(values(load_from_checkpoint(Parts, path)), values(module))


def test_loaded_before_training_is_in_the_files(tmp_path):
    """In on_train_start, say: another module of the class does not have it."""

    class Downloaded(Parts):
        def on_train_start(self):
            self.teacher.load_state_dict(Parts(teacher_seed=6).teacher.state_dict())

    module = Downloaded()
    fitted(tmp_path, module)
    assert not differing(values(load_from_checkpoint(Parts, tmp_path / "run" / "epoch=1.ckpt")), values(module))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_converted(tmp_path, precision):
    module = Parts()
    fitted(tmp_path, module, precision=precision)
    path = tmp_path / "run" / "epoch=1.ckpt"
    assert not set(load(path)["state_dict"]) & TEACHER
    resumed = Parts()
    fitted(tmp_path, resumed, 2, "resumed", given={"ckpt_path": path}, precision=precision)


def test_frozen_and_unfrozen_by_a_callback(tmp_path):
    """What is trained for a while is in the files, whatever its flags say when they are written."""

    class Alternates(Parts):
        def on_train_epoch_start(self):
            self.teacher.requires_grad_(self.current_epoch == 1)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.01)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.teacher(batch[0]).square().mean()

    module = Alternates()
    fitted(tmp_path, module, 3)
    saved = [load(tmp_path / "run" / f"epoch={epoch}.ckpt")["state_dict"] for epoch in range(3)]
    weights = [f"teacher.{index}.{name}" for index in range(3) for name in ("weight", "bias")]
    assert [set(weights) <= set(state) for state in saved] == [False, True, True]
    assert not differing(values(load_from_checkpoint(Parts, tmp_path / "run" / "epoch=2.ckpt")), values(module))


def test_averages_of_the_module(tmp_path):
    from lightning.pytorch.callbacks import EMAWeightAveraging

    module = Parts()
    fitted(tmp_path, module, callbacks=[EMAWeightAveraging(decay=0.9)])
    checkpoint = load(tmp_path / "run" / "epoch=1.ckpt")
    assert not set(checkpoint["state_dict"]) & TEACHER
    assert not {key.removeprefix("module.") for key in checkpoint["current_model_state"]} & TEACHER
    load_from_checkpoint(Parts, tmp_path / "run" / "epoch=1.ckpt")


def test_copy_of_a_module_knows_as_well(tmp_path):
    module = Parts(move=by_hand)
    fitted(tmp_path, module)
    module.trainer = None
    other = copy.deepcopy(module)
    fitted(tmp_path, other, 1, "other")
    again = load_from_checkpoint(Parts, tmp_path / "other" / "epoch=0.ckpt")
    assert not differing(values(again), values(other))


class Meshes(Parts):
    """Has a matrix that is sparse, as networks on graphs and meshes do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("neighbors", torch.eye(300).to_sparse())


class KeepsNeighbors(Callback):
    def state_dict(self):
        return {"neighbors": torch.eye(300).to_sparse()}

    def load_state_dict(self, state_dict):
        pass


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # torch 2.15 says so of each
def test_what_is_sparse_is_in_the_files(tmp_path):
    fitted(tmp_path, Meshes(), 1, callbacks=[KeepsNeighbors()])
    path = tmp_path / "run" / "epoch=0.ckpt"
    assert load(path)["state_dict"]["neighbors"].is_sparse
    fitted(tmp_path, Meshes(), 2, callbacks=[KeepsNeighbors()], given={"ckpt_path": path})
    load_from_checkpoint(Meshes, path)


def test_pickle_of_a_merged_module_is_free_of_us(tmp_path):
    module = Parts()
    trainer(tmp_path, [lora(merge_on_fit_end=True)], max_epochs=1).fit(module, loader())
    assert b"lora_plugins" not in pickle.dumps(module)
