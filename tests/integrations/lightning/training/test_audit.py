"""What does not train, moves though it is frozen, or is made trainable, is said."""

import copy

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    ModelCheckpoint,
)
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_plugins import LoraConfig, LoraModel, StateError
from lora_plugins.integrations.lightning import load_from_checkpoint
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, loader, lora, trainer, values
from tests.integrations.lightning.training.training_cases import fit, learned, lora_b


class Checkpointed(Classifier):
    """The first layer runs inside reentrant gradient checkpointing, whose input needs no gradient."""

    def __init__(self, whole: bool):
        super().__init__()
        self.whole = whole

    def forward(self, x):

        if self.whole:
            return checkpoint(self.net, x, use_reentrant=True)
        return self.net[1:](checkpoint(self.net[0], x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # torch says it too
class TestDeadAdapters:
    def test_part_without_gradient_is_named(self, tmp_path):
        with pytest.warns(UserWarning, match=r"got no gradient.*net\.0\.lora_A.*use_reentrant=False"):
            fit(tmp_path, Checkpointed(whole=False))

    def test_nothing_with_a_gradient_stops(self, tmp_path):
        with pytest.raises((StateError, RuntimeError), match=r"gradient|does not require grad"):
            fit(tmp_path, Checkpointed(whole=True))

    def test_layer_off_the_way_to_the_loss_is_named(self, tmp_path):
        module = Classifier()
        module.unused = nn.Linear(4, 4)
        with pytest.warns(UserWarning, match=r"got no gradient.*unused\.lora_A.*exclude_modules"):
            fit(tmp_path, module, LoraConfig(r=2))

    def test_learning_rate_that_moves_nothing_is_said(self, tmp_path):
        with pytest.warns(UserWarning, match="did not move"):
            fit(tmp_path, Classifier(lr=1e-30))

    @pytest.mark.parametrize(
        ("rates", "left"), [((0.0, 0.1), "2 of 4"), ((0.0, 0.0), "4 of 4")], ids=["a group", "all"]
    )
    def test_learning_rate_of_zero_is_said_at_the_end(self, tmp_path, rates, left):
        with pytest.warns(UserWarning, match=rf"{left} trainable tensors were not trained: the learning rate.* was 0"):
            fit(tmp_path, Groups(rates))

    def test_learning_rate_that_somebody_raises_is_not_named(self, tmp_path):
        class Thaws(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                trainer.optimizers[0].param_groups[0]["lr"] = 0.1 * trainer.current_epoch

        module = Groups((0.0, 0.1))
        trainer(tmp_path, [lora(), Thaws()]).fit(module, loader())
        assert learned(module)


class Groups(Classifier):
    """A backbone and a head with rates of their own."""

    def __init__(self, rates):
        super().__init__()
        self.rates = rates

    def configure_optimizers(self):
        parts = zip((self.net[0], self.net[3]), self.rates, strict=True)
        return torch.optim.AdamW([{"params": part.parameters(), "lr": rate} for part, rate in parts])


class SkipsFirst(Classifier):
    """Has no loss for its first batch, as where a batch has nothing to learn from."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if self.trainer.fit_loop.total_batch_idx else None


class StepsEverySecond(Classifier):
    """Lets its optimizer wait for every second batch, the first included."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class StepsByItself(Classifier):
    """Calls the optimizer of torch itself, past Lightning's."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        optimizer.optimizer.step(optimizer_closure)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`:UserWarning")  # Lightning says it
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # torch does not see the steps
@pytest.mark.parametrize("cls", [SkipsFirst, StepsEverySecond, StepsByItself])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_batches_without_a_step_are_no_sign_of_a_dead_adapter(tmp_path, cls, accumulated):
    module = cls()
    fit(tmp_path, module, accumulate_grad_batches=accumulated)
    assert learned(module)


class InTurns(Classifier):
    """Has a second optimizer, which makes a step of its own in every third batch only."""

    automatic_optimization = False

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[3])]

    def training_step(self, batch, batch_idx):
        often, seldom = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        for optimizer in (often, seldom) if batch_idx % 3 == 2 else (often,):
            optimizer.step()
            optimizer.zero_grad()


def test_optimizer_that_has_not_made_a_step_is_no_sign_of_a_dead_adapter(tmp_path):
    module = InTurns()
    fit(tmp_path, module)
    assert learned(module)


class Adversary(Classifier):
    """Has a critic of its outputs, which makes some steps before each of the net's, as that of a WGAN does."""

    automatic_optimization = False
    net_learns = True

    def __init__(self, critic_steps):
        super().__init__()
        self.critic, self.critic_steps = nn.Linear(3, 1), critic_steps

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.critic, self.net)]

    def training_step(self, batch, batch_idx):
        of_critic, of_net = self.optimizers()
        turn = (self.trainer.fit_loop.total_batch_idx + 1) % (self.critic_steps + 1)
        outputs, optimizer = self(batch[0]), of_critic if turn else of_net
        optimizer.zero_grad()
        self.manual_backward(self.critic(outputs.detach() if turn or not self.net_learns else outputs).mean())
        optimizer.step()


CRITICS = {"beside_an_adapter": "net", "adapted_as_well": None}


@pytest.mark.parametrize("target", CRITICS.values(), ids=CRITICS)
@pytest.mark.parametrize("critic_steps", [1, 5, 14], ids=lambda steps: f"{steps}_steps")
def test_net_whose_critic_steps_first_is_no_dead_adapter(tmp_path, critic_steps, target):
    module = Adversary(critic_steps)
    trainer(tmp_path, [lora(LoraConfig(r=2), target=target)], max_epochs=5).fit(module, loader())
    assert learned(module)


def test_dead_net_whose_critic_steps_first_is_said(tmp_path):
    module = Adversary(critic_steps=2)
    module.net_learns = False
    with pytest.raises(StateError, match=r"No trainable tensor got a gradient: 'net\.0\.lora_A"):
        trainer(tmp_path, [lora(LoraConfig(r=2), target="net")]).fit(module, loader())


def test_net_whose_optimizer_makes_no_step_beside_that_of_a_critic_is_said(tmp_path):
    run = trainer(tmp_path, [lora(LoraConfig(r=2), target="net")], max_epochs=3)
    with pytest.warns(UserWarning, match=r"4 of 4 trainable .* not trained: other .* 12 batches, .*: 'net\.0\.lora_A"):
        run.fit(Adversary(critic_steps=100), loader())


@pytest.mark.parametrize("epochs", [2, 5], ids=["at_the_end", "after_ten_steps"])
def test_dead_layer_is_named_beside_an_optimizer_that_makes_no_step(tmp_path, epochs):
    module = Adversary(critic_steps=100)
    module.critic = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    module.critic[0].forward = lambda x: x[:, :1]
    with pytest.warns(UserWarning, match=r"2 of 8 .*got no gradient.*: 'critic\.0\.lora_A"):
        trainer(tmp_path, [lora(LoraConfig(r=2))], max_epochs=epochs).fit(module, loader())


def test_dead_adapter_is_said_after_batches_without_a_loss(tmp_path):
    class Dead(SkipsFirst):
        def forward(self, x):
            return super().forward(x).detach() + self.extra(x)

        def configure_model(self):
            self.extra = nn.Linear(4, 3)

    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["extra"])
    with pytest.warns(UserWarning, match=r"got no gradient.*net\.0\.lora_A"):
        fit(tmp_path, Dead(), config)


class BeginsLate(torch.optim.SGD):
    """Moves nothing in its first steps, as RAdam does where it does not fall back to SGD."""

    silent = 5

    def step(self, closure=None):
        self.silent -= 1
        return super().step(closure) if self.silent < 0 else closure()


class Late(Classifier):
    def configure_optimizers(self):
        return BeginsLate([p for p in self.parameters() if p.requires_grad], lr=0.1)


def test_optimizer_that_begins_with_steps_of_nothing_is_no_sign_of_a_dead_adapter(tmp_path):
    module = Late()
    fit(tmp_path, module)
    assert learned(module)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 4), (4, 10)], ids=["at_the_end", "after_ten_steps"])
def test_what_has_never_moved_is_named(tmp_path, epochs, steps):
    with pytest.warns(UserWarning, match=f"2 of 4 trainable tensors did not move in {steps} steps"):
        fit(tmp_path, Classifier(lr=1e-30), max_epochs=epochs)


class LikeItsNeck(Classifier):
    """A frozen backbone whose layers have the sizes of a trained one behind them, and an optimizer of that alone."""

    def __init__(self):
        super().__init__()
        self.backbone, self.neck = nn.Linear(16, 16).requires_grad_(False), nn.Linear(16, 16)
        self.net = nn.Sequential(nn.Linear(4, 16), self.backbone, self.neck, nn.Linear(16, 3))

    def configure_optimizers(self):
        return torch.optim.SGD(self.neck.parameters(), lr=0.1)


@pytest.mark.parametrize("epochs", [1, 4], ids=["at_the_end", "after_two_steps"])
def test_what_looks_like_a_teacher_and_has_a_gradient_is_named(tmp_path, epochs):
    config = LoraConfig(r=2, target_modules=["backbone", "neck"])
    with pytest.warns(UserWarning, match=r"2 trainable tensors.*in no optimizer, got gradients.*net\.1\.lora_"):
        fit(tmp_path, LikeItsNeck(), config, max_epochs=epochs)


class PullsToItsOrigin(Classifier):
    """Is held near a copy of itself, as by the proximal term of FedProx, whose gradients reach both."""

    def __init__(self):
        super().__init__()
        self.origin = copy.deepcopy(self.net)

    def training_step(self, batch, batch_idx):
        pairs = zip(self.net.parameters(), self.origin.parameters(), strict=True)
        return super().training_step(batch, batch_idx) + sum((own - its).square().sum() for own, its in pairs)

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


def test_a_copy_may_have_gradients_and_stay(tmp_path):
    module = PullsToItsOrigin()
    fit(tmp_path, module, LoraConfig(r=2))
    assert any(p.grad is not None for p in module.origin.parameters())
    assert learned(module.net)


class WithBackbone(Classifier):
    def __init__(self):
        super().__init__()
        self.backbone = self.net[0]

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class BackboneAsProperty(Classifier):
    configure_optimizers = WithBackbone.configure_optimizers

    @property
    def backbone(self):
        return self.net[0]


class ThawsLater(BaseFinetuning):
    """Thaws the backbone in the second epoch, as BackboneFinetuning does, which says ahead that it will."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


@pytest.mark.parametrize(
    ("finetuning", "said", "steps"),
    [
        (BackboneFinetuning(1, verbose=False), "BackboneFinetuning would make 2 tensors .* in epoch 1: ", 0),
        (ThawsLater(), "were made trainable", 4),
    ],
    ids=["announced", "in_a_hook"],
)
@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist:UserWarning")
def test_base_unfrozen_by_another_callback_is_refused_by_name(tmp_path, finetuning, said, steps):
    fitting = trainer(tmp_path, [lora(), finetuning], max_epochs=3)
    with pytest.raises(StateError, match=rf"{said}.*(backbone|net\.0)\.weight"):
        fitting.fit(WithBackbone(), loader())
    assert fitting.global_step == steps


class ThawsNothing(BackboneFinetuning):
    """Overrides what it thaws."""

    def on_fit_start(self, trainer, pl_module):
        assert self.unfreeze_backbone_at_epoch == 1

    def freeze_before_training(self, pl_module):
        assert not self.verbose

    def finetune_function(self, pl_module, epoch, optimizer):
        assert epoch < 2


@pytest.mark.parametrize(
    ("module", "finetuning", "options"),
    [
        pytest.param(WithBackbone, BackboneFinetuning(2, verbose=False), {}, id="after the end"),
        pytest.param(BackboneAsProperty, BackboneFinetuning(2, verbose=False), {}, id="after the end, as a property"),
        pytest.param(WithBackbone, BackboneFinetuning(1, verbose=False), {"max_steps": 3}, id="after the last step"),
        pytest.param(WithBackbone, ThawsNothing(1), {}, id="by a method of its own"),
        pytest.param(Classifier, ThawsNothing(1), {}, id="without a backbone"),
    ],
)
def test_backbone_that_is_not_unfrozen_is_trained_with(tmp_path, module, finetuning, options):
    made = module()
    before = values(made)
    trainer(tmp_path, [lora(), finetuning], max_epochs=2, **options).fit(made, loader())
    assert not differing(before, values(made)) & before.keys()


class Switches(WithBackbone):
    """Switches the gradients of its part off and on, as GANs do with their discriminator."""

    def training_step(self, batch, batch_idx):
        assert all(p.grad is None for name, p in self.net.named_parameters() if "lora" not in name)
        for on in (False, True):
            self.net.requires_grad_(on)
        return super().training_step(batch, batch_idx)


def test_base_whose_gradients_the_module_switches_stays_frozen(tmp_path):
    """No optimizer has it: the run is that of a module that does not switch, and a line names the tensors once."""
    found, expected = Switches(), WithBackbone()
    with pytest.warns(UserWarning, match=r"frozen base were made trainable.*net\.0\.") as said:
        fit(tmp_path, found, max_epochs=3)
    assert sum("made trainable" in str(each.message) for each in said) == 1
    fit(tmp_path, expected, max_epochs=3)
    assert not differing(values(found), values(expected))


class ClipsAll(WithBackbone):
    """Switches gradients on, in a hook of its own or in the step, and clips those of all its parameters."""

    automatic_optimization = False

    def __init__(self, switches_in: str = ""):
        super().__init__()
        self.switches_in = switches_in

    def switch(self, place):
        if place == self.switches_in:
            self.net.requires_grad_(True)

    def on_train_batch_start(self, batch, batch_idx):
        self.switch("on_train_batch_start")

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.switch("training_step")
        self.manual_backward(super().training_step(batch, batch_idx))
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 0.01)
        optimizer.step()


@pytest.mark.filterwarnings("ignore:.*frozen base were made trainable:UserWarning")
@pytest.mark.parametrize("place", ["on_train_batch_start", "training_step"])
def test_base_that_the_module_switches_on_is_not_in_the_norm_of_gradients(tmp_path, place):
    found, expected = ClipsAll(place), ClipsAll()
    for module in (found, expected):
        fit(tmp_path, module, max_epochs=3)
    assert not differing(values(found), values(expected))


@pytest.mark.filterwarnings("ignore:.*frozen base were made trainable:UserWarning")
def test_base_that_a_run_leaves_switched_on_is_frozen_in_the_next(tmp_path):
    module = Switches()
    for _ in range(2):
        fit(tmp_path, module, max_epochs=2)


class TrainsByTurns(Classifier):
    """Freezes each of its parts while the other one is trained, as GANs do, and leaves the last so."""

    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer, part, other in zip(self.optimizers(), (0, 3), (3, 0), strict=True):
            self.net[part].requires_grad_(True)
            self.net[other].requires_grad_(False)
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    def configure_optimizers(self):
        parts = [[p for p in self.net[part].parameters() if p.requires_grad] for part in (0, 3)]
        return [torch.optim.SGD(part, lr=0.1) for part in parts]


@pytest.mark.filterwarnings("ignore:.*frozen base were made trainable:UserWarning")
def test_adapters_that_a_module_trains_by_turns_are_not_called_frozen(tmp_path):
    module = TrainsByTurns()
    fit(tmp_path, module, max_epochs=3)
    assert learned(module)


@pytest.mark.filterwarnings("ignore:.*frozen base were made trainable:UserWarning")
def test_adapters_of_which_one_batch_of_an_epoch_sees_the_turns_are_not_called_frozen(tmp_path):
    """As in a run that is resumed one batch before the end: its last part has not been trained again by then."""
    fit(tmp_path, TrainsByTurns(), max_epochs=2, limit_train_batches=1)


def test_base_that_an_optimizer_has_is_not_switched_on(tmp_path):
    class HasAll(Switches):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    with pytest.raises(StateError, match=r"made trainable.*net\.0\.weight.*only what requires a gradient"):
        fit(tmp_path, HasAll())


class ThawsItself(Classifier):
    """Says by an option whether its network is frozen, and applies that ahead of its optimizers, as minerva does."""

    def __init__(self, freezes: bool = False):
        super().__init__()
        self.freezes = freezes

    def configure_optimizers(self):
        if not self.freezes:
            self.net.requires_grad_(True)
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)


def test_base_that_configure_optimizers_thaws_is_frozen_again(tmp_path):
    """The run is that of a module that leaves gradients alone, and a line names the tensors once."""
    found, expected = ThawsItself(), ThawsItself(freezes=True)
    head = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    with pytest.warns(UserWarning, match=r"configure_optimizers of ThawsItself made 4 .*net\.0\..*again") as said:
        fit(tmp_path, found, head, max_epochs=3)
    assert sum("frozen again" in str(each.message) for each in said) == 1
    fit(tmp_path, expected, head, max_epochs=3)
    assert not differing(values(found), values(expected))


def test_part_beside_the_target_that_configure_optimizers_thaws_is_trained(tmp_path):
    class BesideTarget(Classifier):
        def __init__(self):
            super().__init__()
            self.scale = nn.Linear(3, 3).requires_grad_(False)

        def forward(self, x):
            return self.scale(super().forward(x))

        def configure_optimizers(self):
            self.scale.requires_grad_(True)
            return super().configure_optimizers()

    module = BesideTarget()
    before = copy.deepcopy(module.scale.state_dict())
    trainer(tmp_path, [lora(LoraConfig(r=2, target_modules=["0"]), target="net")]).fit(module, loader())
    assert differing(module.scale.state_dict(), before) == {"weight", "bias"}


class CallsItsNet(Classifier):
    """Never calls itself, which would be refused in its forward."""

    def _step(self, batch, stage):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("hook", ["on_sanity_check_end", "on_validation_end", "on_train_epoch_end"])
def test_an_adapter_that_a_hook_leaves_merged_stops_the_run(tmp_path, hook):
    """The head would be trained on, and the adapter not any more."""

    class Merges(Callback):
        """Merges ahead of an export, say."""

    setattr(Merges, hook, lambda self, trainer, pl_module: LoraModel(pl_module).merge_adapter())
    head = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"])
    run = trainer(tmp_path, [lora(head), Merges()], max_epochs=2, num_sanity_val_steps=1)
    with pytest.raises(StateError, match=r"Training .* while 'default' is merged\. Call unmerge_adapter"):
        run.fit(CallsItsNet(), loader(), loader())


class PutsOnAnew(Callback):
    """Puts another adapter on in the middle of the run, as a schedule of ranks or tasks does."""

    def __init__(self, name, follow_up):
        self.name, self.follow_up = name, follow_up

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            model = LoraModel(pl_module)
            if self.name in model.adapters:
                model.delete_adapter(self.name)
            model.add_adapter(self.name, CONFIG)
            model.set_adapter(self.name)
            self.follow_up(trainer, pl_module)


def _gives(trainer, module):
    trainer.optimizers[0].add_param_group({"params": [p for p in module.parameters() if p.requires_grad]})


FOLLOW_UPS = {
    "add_param_group": _gives,
    "setup_optimizers": lambda trainer, module: trainer.strategy.setup_optimizers(trainer),
}


@pytest.mark.parametrize("name", ["default", "second"])
class TestAdapterPutOnWithinARun:
    def test_is_named_once_where_no_optimizer_has_it(self, tmp_path, name):
        module = Classifier()
        callback = PutsOnAnew(name, lambda trainer, module: None)
        with pytest.warns(UserWarning, match=rf"4 trainable tensors.*not trained: 'net\.0\.lora_A\.{name}'") as said:
            trainer(tmp_path, [lora(), callback], max_epochs=4).fit(module, loader())
        assert sum("not trained" in str(each.message) for each in said) == 1
        assert not any(b.any() for b in lora_b(module, name).values())

    @pytest.mark.parametrize("follow_up", FOLLOW_UPS.values(), ids=FOLLOW_UPS)
    def test_is_trained_as_the_warning_says(self, tmp_path, name, follow_up):
        module = Classifier()
        callback = PutsOnAnew(name, follow_up)
        trainer(tmp_path, [lora(), callback], max_epochs=4).fit(module, loader())
        assert learned(module, name)


class Writes(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        with torch.no_grad():
            pl_module.net[1].weight.add_(1.0)


def test_base_that_moved_is_said_at_the_end(tmp_path):
    with pytest.raises(StateError, match=r"1 frozen tensor changed.*net\.1\.weight"):
        trainer(tmp_path, [lora(), Writes()]).fit(Classifier(), loader())


class ByLBFGS(Classifier):
    """Diverges, by an optimizer that has the frozen base too and writes into all that it has."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=1000.0)


def test_base_that_moved_as_a_training_diverged_is_told_the_cause(tmp_path):
    with pytest.raises(StateError, match=r"frozen tensors changed.*LBFGS does once training has diverged"):
        fit(tmp_path, ByLBFGS())


@pytest.mark.parametrize("start", [2.0**10, 2.0**40], ids=["fits", "overflows"])
def test_float16_with_a_scaled_loss(tmp_path, start):
    """Steps that are skipped after an overflow are no sign of tensors that do not move."""
    scaler = torch.amp.GradScaler("cpu", init_scale=start, backoff_factor=2.0**-10)
    saver = ModelCheckpoint(tmp_path, filename="it")
    module = Classifier(lr=0.3)
    run = trainer(tmp_path, [lora(), saver], plugins=[MixedPrecision("16-mixed", "cpu", scaler)], max_epochs=4)
    run.fit(module, loader())
    assert (scaler.get_scale() < start) == (start > 2.0**20)
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    again = load_from_checkpoint(Classifier, tmp_path / "it.ckpt")
    assert not differing(values(again), values(module))


class Freezes(Callback):
    """Freezes adapters at some point, as finetuning-scheduler and other people's code do."""

    def __init__(self, hook, layers=(0, 3)):
        self.layers = layers
        setattr(self, hook, self.freeze)

    def freeze(self, trainer, pl_module, *_):
        for index in self.layers:
            pl_module.net[index].requires_grad_(False)


class FreezesItself(Classifier):
    """Freezes what its optimizer has already."""

    def __init__(self, hook):
        super().__init__()
        self.extra = nn.Linear(3, 3)  # something that trains, so that there is a loss
        self.hook = hook

    def forward(self, x):
        return self.extra(super().forward(x))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)
        self._freeze("configure_optimizers")
        return optimizer

    def on_fit_start(self):
        self._freeze("on_fit_start")

    def on_train_start(self):
        self._freeze("on_train_start")

    def _freeze(self, hook):
        if self.hook == hook:
            self.net.requires_grad_(False)


NAMED = r"4 tensors of adapters were frozen.*net\.0\.lora_A\.default.*net\.3\.lora_B\.default.*freeze_backbone=False"


class TestFrozenBySomebody:
    @pytest.mark.parametrize("hook", ["configure_optimizers", "on_fit_start", "on_train_start"])
    def test_module(self, tmp_path, hook):
        module = FreezesItself(hook)
        config = LoraConfig(r=2, target_modules=["net.0", "net.3"], modules_to_save=["extra"])
        with pytest.warns(UserWarning, match=NAMED) as said:
            fit(tmp_path, module, config)
        assert not any("no gradient" in str(each.message) for each in said)
        assert not any(p.any() for name, p in module.named_parameters() if ".lora_B." in name)

    @pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
    @pytest.mark.parametrize("first", [True, False], ids=["before_ours", "after_ours"])
    def test_callback(self, tmp_path, hook, first):
        callbacks = [Freezes(hook, layers=[0]), lora()]
        with pytest.warns(UserWarning, match=r"2 tensors of adapters were frozen.*net\.0\.lora_A"):
            trainer(tmp_path, callbacks if first else callbacks[::-1]).fit(Classifier(), loader())

    @pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_batch_start", "on_train_batch_end"])
    def test_later(self, tmp_path, hook):
        run = trainer(tmp_path, [lora(), Freezes(hook, layers=[3])], max_epochs=1)
        with pytest.warns(UserWarning, match=r"2 tensors of adapters were frozen.*net\.3\.lora_A"):
            run.fit(Classifier(), loader())

    def test_where_a_run_is_resumed(self, tmp_path):
        class GivesAll(Classifier):
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        run = trainer(tmp_path, [lora()], max_epochs=1)
        run.fit(GivesAll(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        resumed = trainer(tmp_path, [lora(), Freezes("on_load_checkpoint", layers=[3])])
        with pytest.warns(UserWarning, match=r"2 tensors of adapters were frozen.*net\.3\.lora_A"):
            resumed.fit(GivesAll(), loader(), ckpt_path=tmp_path / "it.ckpt")

    def test_once(self, tmp_path):
        run = trainer(tmp_path, [lora(), Freezes("on_train_batch_start", layers=[3])], max_epochs=4)
        with pytest.warns(UserWarning) as said:  # noqa: PT030, they are counted
            run.fit(Classifier(), loader())
        assert sum("were frozen" in str(each.message) for each in said) == 1


class LearnsFromAdapted(Classifier):
    """Has a teacher with an adapter of its own, as load_from_checkpoint gives it."""

    def __init__(self):
        super().__init__()
        self.teacher = LoraModel(Classifier(width=8).net, LoraConfig(r=2)).model.requires_grad_(False)

    def forward(self, x):
        return super().forward(x) + self.teacher(x)


def test_teacher_that_its_author_has_adapted_and_frozen_is_not_named(tmp_path):
    module = LearnsFromAdapted()
    before = values(module.teacher)
    trainer(tmp_path, [lora(LoraConfig(r=2), target="net")]).fit(module, loader())
    assert not differing(values(module.teacher), before)


class CopiesItself(Classifier):
    """Makes a teacher of its network when that is adapted already, and counts its batches."""

    def __init__(self, hook: str, hides: bool):
        super().__init__()
        self.batches = 0
        self.copies_in, self.hides = hook, hides

    def on_fit_start(self):
        self._copy("on_fit_start")

    def on_train_start(self):
        self._copy("on_train_start")

    def _copy(self, hook):
        if self.copies_in == hook:
            teacher = copy.deepcopy(self.net).requires_grad_(False)
            self.teacher = [teacher] if self.hides else teacher

    def on_train_batch_start(self, batch, batch_idx):
        self.batches += 1


@pytest.mark.filterwarnings("ignore:Found 2 module.* in eval mode")  # by Lightning, of the copied norm
@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_copy_of_adapted_layers_is_refused_before_the_first_batch(tmp_path, hook):
    module = CopiesItself(hook, hides=False)
    with pytest.raises(
        StateError, match=r"'teacher\.0', 'teacher\.3' were copied after the adapter 'default' was added"
    ):
        trainer(tmp_path, [lora()]).fit(module, loader())
    assert not module.batches


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start"])
def test_a_hidden_copy_of_adapted_layers_is_left_alone(tmp_path, hook):
    module = CopiesItself(hook, hides=True)
    trainer(tmp_path, [lora(merge_on_fit_end=True)]).fit(module, loader())
    assert module.batches


class Thaws(Classifier):
    """Keeps its body frozen in the first epoch."""

    def __init__(self):
        super().__init__()
        self.net[0].requires_grad_(False)

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.trainer.optimizers[0].add_param_group({"params": self.net[0].requires_grad_(True).parameters()})


def test_a_body_that_is_given_to_the_optimizer_later_has_its_adapter_there(tmp_path):
    with pytest.raises(ValueError, match="more than one parameter group") as caught:
        trainer(tmp_path, [lora()], max_epochs=2).fit(Thaws(), loader())
    assert "A and B of it are there from the start" in "".join(caught.value.__notes__)


class Probes(Classifier):
    """Trains its head alone."""

    def forward(self, x):
        with torch.no_grad():
            x = self.net[:3](x)
        return self.net[3](x)


def test_adapted_layers_that_are_computed_without_gradients(tmp_path):
    with pytest.raises(RuntimeError, match="does not require grad") as caught:
        trainer(tmp_path, [lora(LoraConfig(r=2, target_modules=["net.0"]))]).fit(Probes(), loader())
    assert "under torch.no_grad()" in "".join(caught.value.__notes__)


class AsksForGradients(Classifier):
    """Weights its losses by gradients with respect to the last weight, as VQGAN; some versions catch torch's error."""

    def __init__(self, catches: bool):
        super().__init__()
        self.catches = catches

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        try:
            (gradient,) = torch.autograd.grad(loss, self.net[3].weight, retain_graph=True)
        except RuntimeError:
            if self.catches:
                assert not self.training
            raise
        return loss * gradient.norm().detach()


class TestGradientsOfWeights:
    @pytest.mark.parametrize("catches", [False, True], ids=["raised", "caught"])
    @pytest.mark.parametrize("config", [LoraConfig(r=2), LoraConfig(r=2, target_modules=["net.0"])], ids=["on", "off"])
    def test_error_says_what_to_do(self, tmp_path, catches, config):
        with pytest.raises((RuntimeError, AssertionError)) as caught:
            fit(tmp_path, AsksForGradients(catches), config)
        assert "Name that layer in modules_to_save" in "".join(caught.value.__notes__)

    def test_layer_that_is_trained_in_full_has_them(self, tmp_path):
        fit(tmp_path, AsksForGradients(catches=False), LoraConfig(r=2, modules_to_save=["net.3"]))


class AsksForAllGradients(Classifier):
    """Takes the gradients of all parameters of a part, as the checkpointing of ldm does."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        torch.autograd.grad(loss, [*self.net.parameters()], allow_unused=True)
        return loss


class WithCritic(Classifier):
    """Has a loss of a network that is not adapted, as a GAN has."""

    def __init__(self):
        super().__init__()
        self.critic = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        return self.critic(batch[0]).mean()


@pytest.mark.parametrize(
    ("module", "advice"),
    [
        (AsksForAllGradients, "hand it only the parameters that require a gradient"),
        (WithCritic, "frozen unless target_modules or modules_to_save name it"),
    ],
)
def test_error_of_torch_about_what_is_frozen_says_what_to_do(tmp_path, module, advice):
    with pytest.raises(RuntimeError, match="require grad") as caught:
        fit(tmp_path, module(), LoraConfig(r=2, target_modules=["net.0"]))
    assert advice in "".join(caught.value.__notes__)


class ReadsGradients(Callback):
    """Does something with the gradient of every parameter, as what clips or projects gradients by hand does."""

    def __init__(self, read):
        self.read = read

    def on_after_backward(self, trainer, module):
        self.read(module)


READINGS = [
    pytest.param(lambda module: [p.grad.mul_(0.5) for p in module.parameters()], id="its method"),
    pytest.param(lambda module: torch.cat([p.grad.view(-1) for p in module.parameters()]), id="in one vector"),
    pytest.param(lambda module: [2 * p.grad for p in module.parameters()], id="a product"),
    pytest.param(lambda module: torch.stack([torch.norm(p.grad) for p in module.parameters()]), id="a norm"),
]


class TestGradientsOfFrozenParameters:
    @pytest.mark.parametrize("read", READINGS)
    def test_error_says_that_there_are_none(self, tmp_path, read):
        with pytest.raises((AttributeError, TypeError), match="NoneType") as caught:
            trainer(tmp_path, [lora(), ReadsGradients(read)]).fit(Classifier(), loader())
        assert "`grad` of a frozen parameter is None" in "".join(caught.value.__notes__)

    def test_error_says_it_once_for_two_callbacks(self, tmp_path):
        read = ReadsGradients(lambda module: [p.grad.mul_(0.5) for p in module.parameters()])
        callbacks = [lora(LoraConfig(r=2, target_modules=[f"net.{i}"]), adapter_name=f"of_{i}") for i in (0, 3)]
        with pytest.raises(AttributeError, match="NoneType") as caught:
            trainer(tmp_path, [*callbacks, read]).fit(Classifier(), loader())
        assert "".join(caught.value.__notes__).count("`grad` of a frozen parameter is None") == 1

    def test_those_that_skip_them_are_left_alone(self, tmp_path):
        read = ReadsGradients(lambda module: [p.grad.mul_(0.5) for p in module.parameters() if p.requires_grad])
        trainer(tmp_path, [lora(), read]).fit(Classifier(), loader())

    @pytest.mark.parametrize(
        "use",
        [lambda module: module.trainer.logger.log_graph(module), lambda module: module.trainer.logger.grades[0]],
        ids=["no word of it", "another word"],
    )
    def test_error_about_another_none_has_no_note(self, tmp_path, use):
        read = ReadsGradients(use)
        with pytest.raises(AttributeError, match="NoneType") as caught:
            trainer(tmp_path, [lora(), read]).fit(Classifier(), loader())
        assert not hasattr(caught.value, "__notes__")
