"""Teachers, momentum encoders and averages: they follow the adapter of their original, or the run stops at once."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, ModelCheckpoint
from torch import nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lora_plugins import LoraConfig, LoraModel, StateError
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, lora, trainer, values
from tests.integrations.lightning.training.training_cases import learned, lora_b
from tests.slow import thinned

M = 0.9


def by_data(student, teacher):
    """As lightly's update_momentum does."""
    for ours, its in zip(student.parameters(), teacher.parameters(), strict=False):
        its.data = its.data * M + ours.data * (1 - M)


@torch.no_grad()
def in_place(student, teacher):
    """As MoCo and DINO do."""
    for ours, its in zip(student.parameters(), teacher.parameters(), strict=True):
        its.mul_(M).add_(ours.detach(), alpha=1 - M)


def by_data_in_place(student, teacher):
    """Which no version of a tensor tells of."""
    for ours, its in zip(student.parameters(), teacher.parameters(), strict=False):
        its.data.mul_(M).add_(ours.data, alpha=1 - M)


@torch.no_grad()
def by_name(student, teacher):
    theirs = dict(teacher.named_parameters())
    for name, ours in student.named_parameters():
        theirs[name].lerp_(ours, 1 - M)


@torch.no_grad()
def by_state_dict(student, teacher):
    """As timm's ModelEmaV2 does."""
    for its, ours in zip(teacher.state_dict().values(), student.state_dict().values(), strict=False):
        its.copy_(M * its + (1 - M) * ours)


@torch.no_grad()
def by_lerp(student, teacher):
    """As timm's ModelEmaV3 does."""
    pairs = zip(teacher.state_dict().values(), student.state_dict().values(), strict=False)
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_(*map(list, zip(*floats, strict=True)), weight=1 - M)


def offload(student, teacher):
    """To another device and back, as far as memory tells."""
    for parameter in teacher.parameters():
        parameter.data = parameter.data.clone()


UPDATES = [by_data, in_place, by_data_in_place, by_name, by_state_dict, by_lerp]
updates = pytest.mark.parametrize("update", UPDATES, ids=[update.__name__ for update in UPDATES])
WHEN = ["training_step", "on_before_zero_grad", "on_train_batch_end"]


def names(network):
    return [name for name, _ in network.named_parameters()]


def values_of(network):
    return [parameter.data for parameter in network.parameters()]


class Teacher(Classifier):
    """Learns to agree with an average of itself, as BYOL and mean teachers do."""

    def __init__(self, update=by_data, when="training_step", frozen=True, pretrained=False, first=False):
        super().__init__(lr=0.05)
        self.update, self.when = update, when
        self.teacher = Classifier(base_seed=5).net if pretrained else copy.deepcopy(self.net)
        if frozen:
            self.teacher.requires_grad_(False)
        if first:  # of the modules
            student = self.net
            del self.net
            self.net = student

    def save_hyperparameters(self, *_):
        """A function is no hyperparameter."""

    def training_step(self, batch, batch_idx):
        self._move("training_step")
        with torch.no_grad():
            wanted = self.teacher(batch[0])
        return super().training_step(batch, batch_idx) + 0.1 * mse_loss(self(batch[0]), wanted)

    def on_before_zero_grad(self, *_):
        self._move("on_before_zero_grad")

    def on_train_batch_end(self, *_):
        self._move("on_train_batch_end")

    def _move(self, when):
        if when == self.when:
            self.update(self.net, self.teacher)


BOTH = LoraConfig(r=2, target_modules=["net.0", "net.3", "teacher.0", "teacher.3"])
ALONE = LoraConfig(r=2, target_modules=["net.0", "net.3"])


def fit(tmp_path, module, config=BOTH, **options):
    torch.manual_seed(1)
    run = trainer(tmp_path, [lora(config)], **options)
    run.fit(module, loader(), loader())
    return run


def base_of(module):
    return {name: tensor for name, tensor in values(module).items() if ".lora_" not in name}


class Silent(Teacher):
    """Logs nothing, and has an optimizer that reads no value itself."""

    def log(self, *_, **__):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Reads(TorchDispatchMode, Callback):
    """Counts what is read of tensors from the start of each batch to that of the next."""

    def __init__(self):
        super().__init__()
        self.of_batches = []

    def on_train_batch_start(self, *_):
        self.of_batches.append(0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default) and self.of_batches:
            self.of_batches[-1] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:The module has moved the frozen weights of 'teacher.0:UserWarning")
@pytest.mark.parametrize("when", WHEN)
def test_files_of_the_adapter_need_no_other_weights_of_a_teacher(tmp_path, when):
    config = LoraConfig(r=2, target_modules=["net.0", "teacher.0"])
    callback = lora(config, save_adapter_to=tmp_path / "adapter")
    first = trainer(tmp_path, [callback], max_epochs=1)
    first.fit(Teacher(when=when, pretrained=True), loader())
    first.save_checkpoint(tmp_path / "it.ckpt")
    trainer(tmp_path, [callback]).fit(Teacher(when=when, pretrained=True), loader(), ckpt_path=tmp_path / "it.ckpt")


class TestFollows:
    @thinned(
        2,
        update={update.__name__: update for update in UPDATES},
        first={"after": False, "before": True},
        frozen={"frozen": True, "trainable": False},
    )
    def test_teacher_averages_the_adapter(self, tmp_path, update, frozen, first):
        """The expected one is that of the same run without the teacher's part, averaged here."""
        module = Teacher(update, "on_train_batch_end", frozen, first=first)
        averages = []
        inner = module.update

        def watched(student, teacher):
            before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
            inner(student, teacher)
            for name, p in student.named_parameters():
                expected = M * before[name] + (1 - M) * p.detach()
                torch.testing.assert_close(dict(teacher.named_parameters())[name].detach(), expected)
            averages.append(1)

        module.update = watched
        before = base_of(module)
        fit(tmp_path, module)
        assert averages
        assert not differing(before, base_of(module))
        assert learned(module)
        student, teacher = module.net[0].lora_A["default"], module.teacher[0].lora_A["default"]
        assert 0 < (student - teacher).abs().max() < 0.5 * student.abs().max()

    @thinned(
        4,
        when=WHEN,
        update={update.__name__: update for update in (by_data_in_place, by_data)},
        order={"after": {}, "before": {"frozen": False, "first": True}},
        validated=[1, 0],
    )
    def test_file_is_small_and_resumes_bit_for_bit(self, tmp_path, update, when, order, validated):
        options = {"limit_val_batches": validated}
        straight = Teacher(update, when, **order)
        fit(tmp_path, straight, max_epochs=4, **options)
        assert not differing(base_of(Teacher()), base_of(straight))
        torch.manual_seed(1)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, [lora(BOTH), saver], max_epochs=2, **options)
        run.fit(Teacher(update, when, **order), loader(), loader())
        path = tmp_path / "epoch=1.ckpt"
        assert all(".lora_" in key for key in load(path)["state_dict"])
        resumed = Teacher(update, when, **order)
        trainer(tmp_path, [lora(BOTH)], max_epochs=4, **options).fit(resumed, loader(), loader(), ckpt_path=path)
        assert not differing(values(straight), values(resumed))

    def test_its_adapter_stays_frozen_where_a_checkpoint_puts_adapters_on_anew(self, tmp_path):
        """That of an init which changes the base, cast after it was made: what is rounded has other bits."""
        config = replace(BOTH, init="pissa")
        saver = ModelCheckpoint(tmp_path, filename="half")
        trainer(tmp_path, [lora(config), saver], max_epochs=1, precision="bf16-true").fit(Teacher(), loader(), loader())
        run, resumed = trainer(tmp_path, [lora(config)], precision="bf16-true"), Teacher()
        run.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
        trained = {name.partition(".")[0] for name, p in resumed.named_parameters() if p.requires_grad}
        assert trained == {"net"}

    @updates
    def test_merges_and_goes_on(self, tmp_path, update):
        module, callback = Teacher(update), LoraCallback(BOTH)
        for _ in range(2):
            trainer(tmp_path, [callback]).fit(module, loader())
            assert values(module).keys() == values(Teacher()).keys()
        changed = differing(values(module), values(Teacher()))
        assert changed == {f"{part}.{index}.weight" for part in ("net", "teacher") for index in (0, 3)}

    @pytest.mark.parametrize("when", WHEN)
    @pytest.mark.parametrize("batches", [1, 2, 4])
    def test_teacher_with_values_of_its_own_averages_the_update(self, tmp_path, when, batches):
        """The expected weights are the average of what the student computes with."""
        expected = Classifier(base_seed=5).net[0].weight.detach()

        def watched(student, teacher):
            nonlocal expected
            expected = M * expected + (1 - M) * student[0].weight.detach()
            in_place(student, teacher)

        module = Teacher(watched, when, pretrained=True)
        fit(tmp_path, module, max_epochs=1, limit_train_batches=batches)
        learned = module.net[0].weight - Classifier().net[0].weight
        assert (module.teacher[0].weight - expected).norm() < 0.05 * learned.norm()

    def test_teacher_with_values_of_its_own_merges_and_goes_on(self, tmp_path):
        """Its weights are others by then than those that the adapter was put on, and files are of the latter."""
        module, callback = Teacher(in_place, pretrained=True), LoraCallback(BOTH)
        for _ in range(2):
            saver = ModelCheckpoint(tmp_path, filename="it", enable_version_counter=False)
            trainer(tmp_path, [callback, saver]).fit(module, loader(), loader())
        again = load_from_checkpoint(Teacher, tmp_path / "it.ckpt", update=in_place, pretrained=True)
        LoraModel(again).merge_and_unload()
        assert not differing(values(again), values(module))

    def test_files_of_the_adapter_lack_what_was_moved(self, tmp_path):
        """A warning names it: the student is exact, the teacher is not."""
        path = str(tmp_path / "adapter")
        callback = lora(BOTH, save_adapter_to=path)
        with pytest.warns(UserWarning, match=r"frozen weights of .*'teacher\.0\.weight'"):
            trainer(tmp_path, [callback]).fit(Teacher(in_place, pretrained=True), loader(), loader())
        trainer(tmp_path, [lora(BOTH, save_adapter_to=str(tmp_path / "equal"))]).fit(Teacher(), loader(), loader())

    @pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
    @pytest.mark.parametrize("pretrained", [False, True], ids=["equal", "own_values"])
    def test_what_no_optimizer_has_is_a_teacher(self, tmp_path, pretrained, first):
        """As with a frozen one, though it requires gradients (DINO of lightly-train)."""

        class Selected(Teacher):
            def configure_optimizers(self):
                return torch.optim.SGD(self.net.parameters(), lr=self.lr)

        def run(frozen):
            module = Selected(in_place, frozen=frozen, pretrained=pretrained, first=first)
            saver = ModelCheckpoint(tmp_path, filename="it", enable_version_counter=False)
            torch.manual_seed(1)
            trainer(tmp_path, [lora(BOTH), saver]).fit(module, loader(), loader())
            again = load_from_checkpoint(Selected, tmp_path / "it.ckpt", update=in_place, pretrained=pretrained)
            assert not differing(values(again), values(module))
            return values(module)

        found, expected = run(frozen=False), run(frozen=True)
        if first and not pretrained:  # equal parts start with the A of the first one, unless its author froze it
            assert not differing(base_of(Selected()), {key: found[key] for key in base_of(Selected())})
        else:
            assert not differing(found, expected)

    def test_gradients_do_not_train_a_frozen_teacher(self, tmp_path):
        class Leaky(Teacher):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch, batch_idx) + self.teacher(batch[0]).square().mean()

        module = Leaky(lambda *_: None)
        fit(tmp_path, module)
        moved = {name: bool(p.any()) for name, p in lora_b(module).items()}
        assert moved == {f"{part}.{i}.lora_B.default": part == "net" for part in ("net", "teacher") for i in (0, 3)}

    @updates
    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
    def test_no_step_reads_a_value(self, tmp_path, update, frozen):
        """On an accelerator each of them is waited for; values are compared in the first batches."""
        module = Silent(update, "on_train_batch_end", frozen)
        with Reads() as reads:
            run = trainer(tmp_path, [lora(BOTH), reads], max_epochs=1)
            run.fit(module, loader(80))
        assert reads.of_batches[5:-1] == [0] * 4  # the last has the end of the fit

    def test_reference_that_stands_still(self, tmp_path):
        module = Teacher(lambda *_: None)
        start = copy.deepcopy(module.teacher).eval()
        fit(tmp_path, module)
        x = torch.randn(4, 4)
        assert torch.equal(module.teacher.eval()(x), start(x))

    @pytest.mark.parametrize("update", [lambda *_: None, offload], ids=["still", "offloaded"])
    def test_reference_may_be_left_out(self, tmp_path, update):
        fit(tmp_path, Teacher(update), ALONE)

    @pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
    def test_heads(self, tmp_path, frozen):
        """Trained in full in the original, and so averaged in the copy."""
        for named in (["net.3", "teacher.3"], ["net.3"]):
            config = LoraConfig(r=2, target_modules=["net.0", "teacher.0"], modules_to_save=named)
            module = Teacher(by_data, frozen=frozen)
            saver = ModelCheckpoint(tmp_path, filename="it")
            trainer(tmp_path, [lora(config), saver]).fit(module, loader(), loader())
            assert not torch.equal(module.teacher[3].weight, module.net[3].weight)
            again = load_from_checkpoint(Teacher, tmp_path / "it.ckpt", update=by_data)
            assert not differing(values(again), values(module))

    def test_pretrained_teacher_with_values_of_its_own(self, tmp_path):
        """Its weights move towards those of the student, so files have them."""
        module = Teacher(in_place, pretrained=True)
        start = values(module)
        saver = ModelCheckpoint(tmp_path, filename="it")
        trainer(tmp_path, [lora(BOTH), saver]).fit(module, loader(), loader())
        expected = M**8 * start["teacher.0.weight"] + (1 - M**8) * start["net.0.weight"]
        torch.testing.assert_close(values(module)["teacher.0.weight"], expected)
        again = load_from_checkpoint(Teacher, tmp_path / "it.ckpt", update=in_place, pretrained=True)
        assert not differing(values(again), values(module))
        torch.manual_seed(1)
        straight = Teacher(in_place, pretrained=True)
        trainer(tmp_path, [lora(BOTH)], max_epochs=4).fit(straight, loader(), loader())
        torch.manual_seed(1)
        half = Teacher(in_place, pretrained=True)
        trainer(tmp_path, [lora(BOTH), ModelCheckpoint(tmp_path, filename="half")]).fit(half, loader(), loader())
        resumed = Teacher(in_place, pretrained=True)
        run = trainer(tmp_path, [lora(BOTH)], max_epochs=4)
        run.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "half.ckpt")
        assert not differing(values(resumed), values(straight))
        resumed = Teacher(lambda *_: None, pretrained=True)
        saver = ModelCheckpoint(tmp_path, filename="again")
        trainer(tmp_path, [lora(BOTH), saver], max_epochs=3).fit(
            resumed, loader(), loader(), ckpt_path=tmp_path / "it.ckpt"
        )
        assert torch.equal(resumed.teacher[0].weight, module.teacher[0].weight)
        assert "teacher.0.weight" in load(tmp_path / "again.ckpt")["state_dict"]
        again.update = lambda *_: None
        run = trainer(tmp_path, [lora(BOTH)], max_epochs=1)
        run.fit(again, loader())
        run.save_checkpoint(tmp_path / "loaded.ckpt")
        assert "teacher.0.weight" in load(tmp_path / "loaded.ckpt")["state_dict"]

    @pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
    def test_teacher_that_is_copied_late(self, tmp_path, hook):
        """Files have its weights, which no other module of the class has."""

        class Synced(Teacher):
            def sync(self):
                if self.trainer.global_step == 0:
                    self.teacher.load_state_dict(self.net.state_dict())

        setattr(Synced, hook, Synced.sync)
        module = Synced(in_place, pretrained=True)
        saver = ModelCheckpoint(tmp_path, filename="it")
        trainer(tmp_path, [lora(BOTH), saver]).fit(module, loader(), loader())
        again = load_from_checkpoint(Teacher, tmp_path / "it.ckpt", update=in_place, pretrained=True)
        assert not differing(values(again), values(module))


class Target(Classifier):
    """Its target network, as that of a DQN, begins with values of its own and takes the state of the other one."""

    def __init__(self):
        super().__init__()
        self.target = Classifier(base_seed=1).net

    def follow(self):
        self.target.load_state_dict(self.net.state_dict())


class TestStops:
    @updates
    @pytest.mark.parametrize("when", WHEN)
    @pytest.mark.parametrize("pretrained", [False, True], ids=["copy", "own_values"])
    def test_student_alone(self, tmp_path, update, when, pretrained):
        """Either torch stops, and a note says why, or we do; at the first or second batch."""
        module = Teacher(update, when, pretrained=pretrained)
        batches = itertools.count()
        module.on_train_batch_start = lambda *_: next(batches) and None
        with pytest.raises((StateError, RuntimeError, KeyError, ValueError)) as raised:
            fit(tmp_path, module, ALONE)
        said = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert "'teacher' is a copy of 'net'" in said
        assert "'teacher.0', 'teacher.3'" in said
        assert next(batches) <= 2

    def test_copy_with_more_adapters_than_its_original(self, tmp_path):
        config = LoraConfig(r=2, target_modules=["net.0", "teacher.0", "teacher.3"])
        with pytest.raises((StateError, RuntimeError)) as raised:
            fit(tmp_path, Teacher(), config)
        said = " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert "In target_modules and exclude_modules, leave 'teacher.3' out; a `target`" in said

    @pytest.mark.parametrize("hook", ["on_validation_start", "on_train_start", "on_train_epoch_end"])
    def test_a_network_with_other_values_that_takes_the_state(self, tmp_path, hook):
        """Also in the sanity check of the validation, ahead of all training."""
        module = Target()
        setattr(module, hook, module.follow)
        with pytest.raises(RuntimeError, match="Unexpected key") as raised:
            fit(tmp_path, module, ALONE, num_sanity_val_steps=1)
        assert "name the layers of both in target_modules" in "".join(raised.value.__notes__)

    def test_a_state_that_does_not_fit_outside_of_a_fit_gets_no_note(self, tmp_path):
        """There, target_modules adapt nothing."""
        adapted, module = Classifier(), Classifier()
        LoraModel(adapted, ALONE)
        module.on_validation_start = lambda: module.load_state_dict(adapted.state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key") as raised:
            trainer(tmp_path, [lora(ALONE)]).validate(module, loader(), verbose=False)
        assert not hasattr(raised.value, "__notes__")

    def test_a_table_of_parameters_that_is_older_than_the_adapters(self, tmp_path):
        class Averages(Classifier):
            def __init__(self):
                super().__init__()
                self.norms = {name: 0.0 for name, _ in self.named_parameters()}

            def on_before_zero_grad(self, _):
                for name, parameter in self.named_parameters():
                    self.norms[name] = 0.9 * self.norms[name] + 0.1 * parameter.norm().item()

        with pytest.raises(KeyError, match="lora_A") as raised:
            fit(tmp_path, Averages(), ALONE)
        assert "Make it in on_fit_start" in "".join(raised.value.__notes__)

    @pytest.mark.parametrize(
        ("update", "error"),
        [
            (lambda student, teacher: [*zip(student.parameters(), teacher.parameters(), strict=True)], ValueError),
            (
                lambda student, teacher: [*map([*teacher.parameters()].__getitem__, range(len(names(student))))],
                IndexError,
            ),
            (lambda student, teacher: [dict(teacher.named_parameters())[name] for name in names(student)], KeyError),
            (lambda *pair: torch._foreach_lerp_(*map(values_of, pair), 0.5), RuntimeError),
        ],
        ids=["zip", "list", "table", "foreach"],
    )
    def test_an_error_of_pairs_gets_a_note(self, tmp_path, update, error):
        with pytest.raises(error) as raised:
            fit(tmp_path, Teacher(update), ALONE)
        assert "'teacher' is a copy of 'net'" in "".join(raised.value.__notes__)

    @pytest.mark.parametrize("error", [RuntimeError("out of paper"), KeyError("paper")], ids=repr)
    def test_an_error_that_has_nothing_to_do_with_pairs_gets_no_note(self, tmp_path, error):
        def fails(*_):
            raise error

        with pytest.raises(type(error), match="paper") as raised:
            fit(tmp_path, Teacher(fails), ALONE)
        assert not getattr(raised.value, "__notes__", [])

    def test_a_copy_that_is_a_layer_itself(self, tmp_path):
        module = Classifier()
        module.mean = copy.deepcopy(module.net[0]).requires_grad_(False)
        module.on_train_batch_end = lambda *_: module.mean.load_state_dict(module.net[0].state_dict())
        with pytest.raises(RuntimeError, match="Unexpected key") as raised:
            fit(tmp_path, module, LoraConfig(r=2, target_modules=["net.0"]))
        assert "adapt 'mean' as 'net.0' are; a `target`" in "".join(raised.value.__notes__)

    def test_late_average(self, tmp_path):
        module = Teacher(lambda *pair: in_place(*pair) if module.current_epoch == 2 else None)
        with pytest.raises((StateError, RuntimeError, ValueError)) as raised:
            fit(tmp_path, module, ALONE, max_epochs=4)
        assert "is a copy of 'net'" in " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])
        assert module.current_epoch == 2

    def test_outside_the_target(self, tmp_path):
        run = trainer(tmp_path, [LoraCallback(LoraConfig(r=2), target="net")])
        with pytest.raises((StateError, RuntimeError)) as raised:
            run.fit(Teacher(), loader())
        assert "is a copy of 'net'" in " ".join([str(raised.value), *getattr(raised.value, "__notes__", [])])

    def test_a_copy_whose_adapter_has_another_name(self, tmp_path):
        callbacks = [lora(LoraConfig(r=2), target=name, adapter_name=name) for name in ("net", "teacher")]
        with pytest.raises(StateError, match=r"not the same\. Adapt both by one LoraCallback; a `target` has to have"):
            trainer(tmp_path, callbacks).fit(Teacher(in_place), loader())

    @pytest.mark.parametrize("pretrained", [False, True], ids=["copy", "own_values"])
    def test_pairs_from_before_there_were_adapters(self, tmp_path, pretrained):
        module = Teacher(lambda *_: early(), pretrained=pretrained)
        pairs = list(zip(module.net.parameters(), module.teacher.parameters(), strict=True))

        @torch.no_grad()
        def early():
            for ours, its in pairs:
                its.lerp_(ours, 1 - M)

        with pytest.raises(StateError, match="does not follow"):
            fit(tmp_path, module)
        assert module.global_step <= 4

    def test_pairs_of_some_names(self, tmp_path):
        """As in older versions of pl_bolts."""

        @torch.no_grad()
        def weights(student, teacher):
            for (name, own), (_, its) in zip(student.named_parameters(), teacher.named_parameters(), strict=True):
                if "weight" in name:
                    its.lerp_(own, 1 - M)

        with pytest.raises(StateError, match=r"does not follow: .*, or those of some names alone \('weight'\)"):
            fit(tmp_path, Teacher(weights))

    def test_original_that_is_moved(self, tmp_path):
        """What is written into the base of the student is no average, and is told after the first steps."""
        module = Teacher(lambda student, _: student[1].weight.data.add_(0.1))
        with pytest.raises(StateError, match=r"1 frozen tensor changed.*net\.1\.weight"):
            fit(tmp_path, module, ALONE)
        assert module.global_step <= 4


class Spectrum(nn.Module):
    """Complex weights, as those of Fourier layers: no adapter is made for them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.complex64), requires_grad=False)

    def forward(self, x):
        return torch.fft.irfft(torch.fft.rfft(x) * self.weight.sum(0), n=4)


class Spectral(Teacher):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for part in (self.net, self.teacher):
                part.insert(0, Spectrum())
        self.teacher[0].load_state_dict(self.net[0].state_dict())


@pytest.mark.parametrize("update", [by_data, in_place, by_data_in_place, by_name, by_state_dict])
def test_complex_weights_beside_adapters_are_averaged(tmp_path, update):
    module, config = Spectral(update), LoraConfig(r=2, target_modules=["net.1", "net.4", "teacher.1", "teacher.4"])
    before = base_of(module)
    run = fit(tmp_path, module, config)
    assert not differing(before, base_of(module))
    run.save_checkpoint(tmp_path / "it.ckpt")
    assert all(".lora_" in key for key in load(tmp_path / "it.ckpt")["state_dict"])
    resumed = Spectral(update)
    trainer(tmp_path, [lora(config)]).fit(resumed, loader(), ckpt_path=tmp_path / "it.ckpt")
    assert not differing(values(module), values(resumed))


class Averaged(Classifier):
    """Has an AveragedModel of torch inside, as many modules do."""

    def __init__(self):
        super().__init__()
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(M), use_buffers=True)

    def on_before_zero_grad(self, *_):
        self.average.update_parameters(self.net)

    def validation_step(self, batch, batch_idx):
        self.average(batch[0])


class NamedAverage(nn.Module):
    """Averages the parameters whose names it took when it was made, as ema_pytorch.EMA does."""

    def __init__(self, model):
        super().__init__()
        self.online = [model]
        self.model = copy.deepcopy(model)
        self.names = {name for name, _ in self.model.named_parameters()}

    def named(self, model):
        return [parameter for name, parameter in model.named_parameters() if name in self.names]

    def update(self):
        for its, ours in zip(self.named(self.model), self.named(self.online[0]), strict=True):
            its.data.lerp_(ours.data, 1 - M)


class Named(Classifier):
    def __init__(self):
        super().__init__()
        self.average = NamedAverage(self.net)

    def on_before_zero_grad(self, *_):
        self.average.update()


@pytest.mark.parametrize(("cls", "part"), [(Averaged, "average.module"), (Named, "average.model")])
class TestWrappers:
    def test_follows_resumes_and_merges(self, tmp_path, cls, part):
        config = LoraConfig(r=2, target_modules=["net.0", "net.3", f"{part}.0", f"{part}.3"])
        module = cls()
        before = {name: tensor for name, tensor in base_of(module).items() if "n_averaged" not in name}
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        torch.manual_seed(1)
        trainer(tmp_path, [lora(config), saver], max_epochs=3).fit(module, loader(), loader())
        assert not {name for name in differing(before, base_of(module)) if "n_averaged" not in name}
        own, its = module.net[0].lora_B["default"], module.get_submodule(part)[0].lora_B["default"]
        assert its.abs().sum() > 0
        assert not torch.equal(own, its)
        resumed = cls()
        run = trainer(tmp_path, [lora(config)], max_epochs=3)
        run.fit(resumed, loader(), loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
        assert not differing(values(resumed), values(module))
        trainer(tmp_path, [LoraCallback(config)], max_epochs=1).fit(module, loader(), loader())
        assert values(module).keys() == values(cls()).keys()
        if cls is Named:
            assert module.average.names == cls().average.names

    def test_all(self, tmp_path, cls, part):
        module = cls()
        trainer(tmp_path, [lora(LoraConfig(r=2))], max_epochs=3).fit(module, loader(), loader())
        assert module.get_submodule(part)[0].lora_B["default"].abs().sum() > 0
        LoraModel(module).unload()
        assert not {name for name in differing(values(module), values(cls())) if "n_averaged" not in name}


class Projector(nn.Module):
    """A network and a projection of its own."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.projection = nn.Linear(3, 3)

    def forward(self, x):
        return self.projection(self.model(x))


class OneBackbone(Classifier):
    """Its target has a projection of its own on the same backbone, as torchgeo's BYOL does."""

    def __init__(self, update=by_data, target_first=False):
        super().__init__(lr=0.05)
        self.update = update
        names = ["online", "target"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            for name in reversed(names) if target_first else names:
                setattr(self, name, Projector(self.net))
        self.target.projection.requires_grad_(not target_first)

    def save_hyperparameters(self, *_):
        """A function is no hyperparameter."""

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            wanted = self.target(batch[0])
        self.update(self.online, self.target)
        return mse_loss(self.online(batch[0] + 0.1), wanted)


@pytest.mark.parametrize("target_first", [False, True], ids=["online_first", "target_first"])
@pytest.mark.parametrize("update", [by_data, by_name, by_state_dict, by_lerp])
class TestSharesWhatItAverages:
    def test_base_stays_and_files_are_exact(self, tmp_path, update, target_first):
        def run(callbacks, epochs, **given):
            torch.manual_seed(1)
            module = OneBackbone(update, target_first)
            trainer(tmp_path, callbacks, max_epochs=epochs).fit(module, loader(), loader(), **given)
            return module

        config = LoraConfig(r=2)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        module, start = run([lora(config), saver], 4), values(OneBackbone(update, target_first))
        changed = differing(start, base_of(module)) & start.keys()
        assert {name for name in changed if "num_batches" not in name and "running" not in name} == {
            "target.projection.weight",
            "target.projection.bias",
        }
        expected = M**16 * start["target.projection.bias"] + (1 - M**16) * start["online.projection.bias"]
        torch.testing.assert_close(module.target.projection.bias.detach(), expected)
        assert module.net[0].lora_B["default"].any()
        assert module.target.projection.lora_B["default"].any()
        path = tmp_path / "epoch=1.ckpt"
        assert "net.0.weight" not in load(path)["state_dict"]
        resumed = run([lora(config)], 4, ckpt_path=path)
        assert not differing(values(resumed), values(module))
        path = tmp_path / "epoch=3.ckpt"
        again = load_from_checkpoint(OneBackbone, path, update=update, target_first=target_first)
        assert not differing(values(again), values(module))

    def test_merges(self, tmp_path, update, target_first):
        module, callback = OneBackbone(update, target_first), LoraCallback(LoraConfig(r=2))
        for _ in range(2):
            trainer(tmp_path, [callback]).fit(module, loader())
            assert values(module).keys() == values(OneBackbone(update, target_first)).keys()


@pytest.mark.parametrize("update", [in_place, by_data_in_place])
def test_average_with_itself_that_shrinks_what_is_shared(tmp_path, update):
    """In place, `m * x` is written before `(1 - m) * x` is added: no average, without adapters neither."""
    with pytest.raises(StateError, match=r"frozen tensors changed.*net\.0\.weight"):
        fit(tmp_path, OneBackbone(update), LoraConfig(r=2))


class Towers(Classifier):
    """Two that start from one pretrained network, and follow each other in nothing."""

    def __init__(self):
        super().__init__()
        self.other = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x) - self.other(x.flip(0))


def test_towers_of_one_pretrained_network_are_trained_each_on_its_own(tmp_path):
    module = Towers()
    fit(tmp_path, module, LoraConfig(r=2))
    assert learned(module)
    fit(tmp_path, Towers(), LoraConfig(r=2, target_modules=["net.0"]))


@pytest.mark.parametrize("target_modules", [["net.0", "other.0"], ["net.0"]], ids=["alike", "unlike"])
@pytest.mark.parametrize("tower", ["net", "other"])
def test_head_of_one_tower_alone_is_trained(tmp_path, tower, target_modules):
    """Steps as small as the rounding of an average are no rounding there."""
    module = Towers()
    module.lr, head = 2e-7, module.get_submodule(f"{tower}.3")
    before = head.weight.clone()
    fit(tmp_path, module, LoraConfig(r=2, target_modules=target_modules, modules_to_save=[f"{tower}.3"]))
    assert not torch.equal(head.weight, before)


class TwoPairs(Classifier):
    """Two networks of one layout with an average each, as DenseCL's heads and twin critics with their targets."""

    def __init__(self, frozen):
        super().__init__(lr=0.05)
        self.other = Classifier(base_seed=1).net
        self.averages = nn.ModuleDict({name: copy.deepcopy(getattr(self, name)) for name in ("net", "other")})
        self.averages.requires_grad_(not frozen)

    def forward(self, x):
        return self.net(x) - self.other(x.flip(0))

    def on_train_batch_end(self, *_):
        for name, average in self.averages.items():
            by_data(getattr(self, name), average)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])
def test_each_of_two_averages_starts_as_its_own_original(tmp_path, frozen):
    module = TwoPairs(frozen)
    fit(tmp_path, module, LoraConfig(r=2), max_epochs=1)
    for name, average in module.averages.items():
        learned, averaged = (part[0].lora_A["default"] for part in (getattr(module, name), average))
        assert 0 < (learned - averaged).abs().max() < 0.5 * learned.abs().max()


class TowerOfItsOwn(Towers):
    """The other one begins with values of its own, behind the first."""

    def __init__(self):
        super().__init__()
        self.other = Classifier(base_seed=1, width=16).net

    @property
    def backbone(self):
        return self.other


class ThawsTower(TowerOfItsOwn):
    """Trains the other one from its second epoch on."""

    def __init__(self):
        super().__init__()
        self.other.requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.other.requires_grad_(True)
            self.optimizers().add_param_group({"params": [*self.other.parameters()]})


LATER = {
    "by_BackboneFinetuning": (TowerOfItsOwn, [BackboneFinetuning(1, train_bn=False)]),
    "by_the_module": (ThawsTower, []),
}


@pytest.mark.parametrize(("cls", "others"), LATER.values(), ids=LATER)
def test_tower_that_is_trained_later_is_no_copy(tmp_path, cls, others):
    module = cls()
    before, config = values(module.other), LoraConfig(r=2, target_modules=["0"])
    trainer(tmp_path, [lora(config, target="net"), *others]).fit(module, loader())
    assert {"0.weight", "3.weight"} <= differing(values(module.other), before)


def test_layers_that_are_clones_of_one_are_no_copies(tmp_path):
    """`nn.TransformerEncoder` clones its layer: all start with equal values, and none follows another."""

    class Encoder(LightningModule):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

        def on_train_start(self):
            self.starts = [layer.linear1.lora_A["default"].clone() for layer in self.net.layers]

        def training_step(self, batch, _):
            return mse_loss(self.net(batch), batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=0.1)

    module = Encoder()
    lora = LoraCallback(LoraConfig(r=2), merge_on_fit_end=False, print_plan=False)
    run = trainer(tmp_path, [lora], max_epochs=1)
    run.fit(module, DataLoader(torch.randn(4, 3, 8), batch_size=2))
    assert not torch.equal(*module.starts)
