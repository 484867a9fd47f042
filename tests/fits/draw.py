"""What a fit is, and draws one: any setting goes with any other, except where `LIMITS` says why not."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from tests.fits.networks import NETWORKS


@dataclass(frozen=True)
class Fit:
    """All settings of a run. The defaults are those of the shortest one.

    Args:
        network: Its class, of `networks.py`.
        towers: How many of them the module has; their outputs are added up.
        target: Whether each tower is a callback's `target`, or the module is adapted as a whole, by one callback.
        calls: How towers are called: plainly, so that the backward computes what is inside of them again, by
            `functional_call`, or for each half of a batch.
        build: Where the module makes its towers: in the constructor, in `setup` or in `configure_model`.
        penalty: What the loss punishes beside: large `weights` of adapted layers, or large `gradients` of the input.
        toggles: Whether the module freezes all of itself for validation, and thaws all of it behind that.
        loop: Who steps: Lightning, Lightning with a warm-up in `optimizer_step`, or the module, with one or two
            optimizers, or twice a batch (`sam`).
        optimizer: Of `optimizers.py`.
        scheduler: Likewise.
        groups: How many groups of parameters the optimizer has.
        init: How A and B start.
        variant: How they change the weight.
        second: The init of a second adapter of the same layers, if there is one, with a callback of its own.
        storage: In how many bits the weights of adapted layers are stored.
        heads: What is trained in full: `none`, the `head`, or `two`, the last of the layers as well.
        bias: Which biases are trained.
        b_ratio: `loraplus_lr_ratio`.
        head_ratio: `heads_lr_ratio`.
        memory: What is kept for the backward.
        norm: What running statistics do.
        resting: Whether the towers arrive in eval mode, and stay in it.
        copies: What the module has beside what it trains: nothing, an `average` of a tower that it moves by hand, a
            frozen `teacher`, or a `center` of its outputs that it moves by hand, an `inner center` in a tower.
        moved_in: The hook in which the module moves what it moves by hand.
        order: Whether the callback stands before or after all others.
        precision: Of the trainer.
        epochs: How many.
        samples: Of an epoch.
        batch_size: Of the training data.
        shuffle: Whether each epoch has its own order.
        accumulate: Batches of a step.
        accumulate_by_epoch: Whether a callback says so, and changes it.
        clip: Largest norm, or value, of a gradient.
        clip_by: Which of the two.
        check_interval: `val_check_interval`.
        check_every: `check_val_every_n_epoch`.
        sanity: Batches of the sanity check.
        inference_mode: Of the trainer.
        reload: After how many epochs loaders are made again.
        max_steps: Where the fit ends before its epochs do.
        limit: Batches of an epoch; 1.0 for all.
        overfit: Batches of `overfit_batches`.
        averaging: The averaging callback.
        finder: Whether LearningRateFinder makes trials before the fit.
        early: Whether there is an EarlyStopping.
        checkpoints: When they are written.
        weights_only: Whether they lack the state of optimizers.
        on_exception: Whether an OnExceptionCheckpoint is there.
        best: Whether the callback takes the best weights in the end.
        merge: Whether it merges them.
        before: What is done with the module before the fit.
        stop: What a callback does in the middle of it.
        stop_in: In which hook.
        stop_at: At which of its calls.
        goes_on: How a stopped fit goes on: not, by a new module from the newest checkpoint (`resume`), or by the same
            module and callback (`again`).
        after: What is done after the fit.
        seed: Of A and B.
    """

    network: str = "Mlp"
    towers: int = 1
    target: str = "tower"
    calls: str = "plain"
    penalty: str = "none"
    toggles: bool = False
    build: str = "init"
    loop: str = "automatic"
    optimizer: str = "AdamW"
    scheduler: str = "none"
    groups: int = 1
    init: str = "kaiming"
    variant: str = "lora"
    second: str = "none"
    storage: str = "none"
    heads: str = "head"
    bias: str = "none"
    b_ratio: float = 1.0
    head_ratio: float = 1.0
    memory: str = "normal"
    norm: str = "freeze"
    resting: bool = False
    copies: str = "none"
    moved_in: str = "on_train_batch_end"
    order: str = "first"
    precision: str = "64-true"
    epochs: int = 1
    samples: int = 24
    batch_size: int = 8
    shuffle: bool = False
    accumulate: int = 1
    accumulate_by_epoch: bool = False
    clip: float | None = None
    clip_by: str = "norm"
    check_interval: float = 1.0
    check_every: int = 1
    sanity: int = 0
    inference_mode: bool = True
    reload: int = 0
    max_steps: int = -1
    limit: float = 1.0
    overfit: int = 0
    averaging: str = "none"
    finder: bool = False
    early: bool = False
    checkpoints: str = "none"
    weights_only: bool = False
    on_exception: bool = False
    best: bool = False
    merge: bool = True
    before: str = "nothing"
    stop: str = "none"
    stop_in: str = "on_train_batch_end"
    stop_at: int = 1
    goes_on: str = "none"
    after: str = "nothing"
    seed: int = 0

    def __repr__(self) -> str:
        plain = Fit()
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [f"{key}={value!r}" for key, value in given.items() if value != getattr(plain, key)]
        return f"Fit({', '.join(shown)})"

    @property
    def steps_itself(self) -> bool:
        """Whether the module, not Lightning, calls the optimizer."""
        return self.loop in ("manual", "two optimizers", "sam")


CHOICES: Mapping[str, tuple[Any, ...]] = {
    "network": tuple(NETWORKS),
    "towers": (1, 1, 1, 2),
    "target": ("tower", "tower", "module"),
    "calls": ("plain", "plain", "plain", "checkpointed", "functional", "halves"),
    "penalty": ("none", "none", "none", "weights", "gradients"),
    "toggles": (False, False, False, True),
    "build": ("init", "init", "setup", "configure_model"),
    "loop": ("automatic",) * 4 + ("warmup", "manual", "two optimizers", "sam"),
    "optimizer": (
        "AdamW",
        "AdamW",
        "SGD",
        "AMSGrad",
        "RMSprop",
        "Adagrad",
        "NAdam",
        "LBFGS",
        "Adamax",
        "RAdam",
        "Adafactor",
        "fused",
    ),
    "scheduler": ("none", "step", "cosine", "exponential", "lambda", "plateau", "one cycle", "sequence", "restarts"),
    "groups": (1, 1, 2),
    "init": ("kaiming", "gaussian", "pissa", "olora"),
    "variant": ("lora", "lora", "dora"),
    "second": ("none",) * 4 + ("kaiming", "orthogonal"),
    "storage": ("none", "none", "none", "nf4", "int8"),
    "heads": ("head", "head", "none", "two"),
    "bias": ("none", "none", "all"),
    "b_ratio": (1.0, 1.0, 2.0, 4.0),
    "head_ratio": (1.0, 1.0, 0.5, 3.0),
    "memory": ("normal", "normal", "low"),
    "resting": (False, False, False, True),
    "norm": ("freeze", "freeze", "track"),
    "copies": ("none", "none", "average", "teacher", "center", "inner center"),
    "order": ("first", "first", "last"),
    "moved_in": ("on_train_batch_end", "on_before_zero_grad"),
    "precision": ("64-true",) * 5 + ("32-true",),
    "epochs": (1, 2, 3),
    "samples": (24, 32, 40),
    "batch_size": (8, 8, 5),
    "shuffle": (True, False),
    "accumulate": (1, 1, 2, 3),
    "accumulate_by_epoch": (False, False, False, True),
    "clip": (None, None, 0.5),
    "clip_by": ("norm", "value"),
    "check_interval": (1.0, 1.0, 0.5),
    "check_every": (1, 1, 2),
    "sanity": (0, 2),
    "inference_mode": (True, False),
    "reload": (0, 0, 1),
    "max_steps": (-1, -1, -1, -1, 7),
    "limit": (1.0, 1.0, 1.0, 1.0, 3),
    "overfit": (0, 0, 0, 0, 0, 0, 2),
    "averaging": ("none",) * 6 + ("swa", "ema", "weights"),
    "finder": (False,) * 6 + (True,),
    "early": (False, False, True),
    "checkpoints": ("last", "steps", "epoch", "none"),
    "weights_only": (False,) * 5 + (True,),
    "on_exception": (False, False, False, True),
    "best": (False, False, True),
    "merge": (True, True, False),
    "before": ("nothing", "nothing", "nothing", "validate"),
    "stop": ("none", "raise", "raise", "interrupt", "stop", "save"),
    "stop_in": (
        "on_train_start",
        "on_train_batch_start",
        "on_after_backward",
        "on_before_optimizer_step",
        "on_train_batch_end",
        "on_validation_end",
        "on_train_epoch_end",
        "on_before_backward",
        "on_before_zero_grad",
        "on_train_epoch_start",
        "on_validation_start",
    ),
    "stop_at": (1, 2, 3, 5),
    "goes_on": ("resume", "again"),
    "after": ("nothing", "fit", "new trainer", "test", "test best", "copy", "validate", "resume"),
}
"""What is drawn, a value as often as it stands here."""


@dataclass(frozen=True)
class Limit:
    """Settings that do not go together.

    Args:
        holds: Whether a fit has them.
        instead: What it is given in their place.
    """

    holds: Callable[[Fit], bool]
    instead: Mapping[str, Any]


LIMITS = (
    # Lightning refuses these in manual optimization, or they would do nothing.
    Limit(lambda fit: fit.steps_itself, {"accumulate": 1, "accumulate_by_epoch": False, "clip": None}),
    Limit(lambda fit: fit.steps_itself and fit.averaging == "swa", {"averaging": "none"}),
    Limit(lambda fit: fit.accumulate_by_epoch, {"accumulate": 1}),
    # The warm-up sets the rate of all groups itself, and so do the finder and SWA.
    Limit(lambda fit: fit.loop == "warmup", {"scheduler": "none", "groups": 1}),
    Limit(lambda fit: fit.loop != "automatic", {"finder": False}),
    Limit(lambda fit: fit.finder or fit.averaging == "swa", {"b_ratio": 1.0, "head_ratio": 1.0}),
    # The finder's trials move running statistics of the plain module, which the callback has frozen by then.
    Limit(lambda fit: fit.finder and fit.network in ("Mlp", "Conv"), {"network": "Twice"}),
    # Lightning's averaging callbacks copy the module in `setup`, where one that is made later has nothing yet; only
    # those of 2.6 call `configure_model` themselves before.
    Limit(lambda fit: fit.averaging != "none" and fit.build == "setup", {"build": "init"}),
    Limit(lambda fit: fit.averaging == "swa", {"build": "init"}),
    # SWA moves the average into the module at the end, which only the module's own copies could tell from training.
    Limit(lambda fit: fit.averaging == "swa", {"copies": "none"}),
    # A teacher is outside of what is adapted; an average has adapters of its own, moved as those of its tower.
    Limit(lambda fit: fit.copies == "teacher", {"target": "tower"}),
    Limit(lambda fit: fit.copies == "average", {"target": "module"}),
    # All biases would be those of the average as well, each moved by its own gradient.
    Limit(lambda fit: fit.copies == "average", {"bias": "none"}),
    # Integers cannot be averaged, and before the fit nothing is stored yet.
    Limit(lambda fit: fit.storage != "none" and fit.copies == "average", {"copies": "none"}),
    Limit(lambda fit: fit.storage != "none", {"before": "nothing"}),
    # A module with merged weights has no adapter that a fit could go on with from its checkpoint.
    Limit(lambda fit: fit.after == "resume", {"merge": False}),
    # Beside the best weights Lightning would save the last average, which the callback replaces by them.
    Limit(lambda fit: fit.best and fit.averaging != "none" and fit.after == "resume", {"after": "nothing"}),
    # Lightning gives a module that is tested after a fit the weights before averaging; the callback, the averaged ones.
    Limit(lambda fit: fit.averaging in ("ema", "weights") and fit.after == "test best", {"after": "test"}),
    # A checkpoint from before the first move is refused by a module that has moved since, and says so.
    Limit(lambda fit: fit.goes_on == "again", {"moved_in": "on_train_batch_end"}),
    # Nor does the best checkpoint put back what has moved since, where it is from before that, and a warning says so.
    Limit(lambda fit: fit.best and "center" in fit.copies and fit.checkpoints == "steps", {"checkpoints": "epoch"}),
    # LBFGS has one group, and a loss that it asks for again; Lightning asks for no accumulation then.
    Limit(lambda fit: fit.optimizer == "LBFGS", {"groups": 1, "b_ratio": 1.0, "head_ratio": 1.0}),
    Limit(lambda fit: fit.optimizer == "LBFGS" and fit.steps_itself, {"loop": "automatic"}),
    Limit(lambda fit: fit.optimizer == "LBFGS", {"accumulate": 1, "accumulate_by_epoch": False}),
    # DoRA has a magnitude for each output, which the weight of a transposed layer does not have as its first axis.
    Limit(lambda fit: bool(NETWORKS[fit.network].columns), {"variant": "lora"}),
    # What is single is rounded more than it is trained where an optimizer divides by what is nearly zero.
    Limit(lambda fit: fit.precision == "32-true", {"optimizer": "SGD", "finder": False}),
    # A bias in front of a norm that subtracts means has a gradient of nothing but rounding, and a warning says so.
    Limit(lambda fit: fit.precision == "32-true" and fit.norm == "track", {"bias": "none"}),
    Limit(lambda fit: fit.optimizer == "Adafactor" and fit.norm == "track", {"bias": "none"}),  # which scales it up
    # What a variant makes of two updates is that of their sum, and an average has one adapter.
    Limit(lambda fit: fit.variant != "lora", {"second": "none"}),
    Limit(lambda fit: fit.copies == "average", {"second": "none"}),
    # An optimizer needs parameters.
    Limit(lambda fit: fit.loop == "two optimizers" and fit.heads == "none", {"heads": "head"}),
    Limit(lambda fit: fit.groups == 2 and fit.heads == "none" and fit.variant == "lora", {"groups": 1}),
    # An exception leaves the parameters of the other optimizer frozen, as `toggle_optimizer` has set them.
    Limit(lambda fit: fit.loop == "two optimizers" and fit.goes_on == "again", {"goes_on": "resume"}),
    # One in the middle of a validation leaves all of the module frozen, as it has set itself.
    Limit(lambda fit: fit.toggles and "validation" in fit.stop_in and fit.goes_on == "again", {"goes_on": "resume"}),
    # Nothing to resume from, to look for the best among, or to write at an exception.
    Limit(lambda fit: fit.checkpoints == "none", {"best": False, "on_exception": False, "weights_only": False}),
    Limit(lambda fit: fit.checkpoints == "none" and fit.goes_on == "resume", {"goes_on": "none"}),
    # Lightning resumes from no file that lacks the state of optimizers.
    Limit(lambda fit: fit.weights_only and fit.stop not in ("none", "save"), {"weights_only": False}),
    # Tokens have no gradient, memory="low" has no second one, and nothing else is to be thawed than what is trained.
    Limit(lambda fit: bool(NETWORKS[fit.network].columns) and fit.penalty == "gradients", {"penalty": "none"}),
    Limit(lambda fit: fit.penalty == "gradients", {"memory": "normal"}),
    Limit(lambda fit: fit.toggles, {"copies": "none"}),
    # torch gives whole numbers no gradient, and says so.
    Limit(lambda fit: fit.storage != "none", {"toggles": False}),
    # What does not stop does not go on, and nothing is trained where the first batch is not reached.
    Limit(lambda fit: fit.stop in ("none", "save"), {"goes_on": "none"}),
    Limit(lambda fit: fit.stop == "none", {"stop_in": "on_train_batch_end", "stop_at": 1}),
    Limit(
        lambda fit: fit.stop == "stop" and fit.stop_in in ("on_train_start", "on_train_epoch_start"),
        {"stop_in": "on_train_batch_end"},
    ),
    # EarlyStopping asks for a validation in every epoch.
    Limit(lambda fit: fit.early, {"check_every": 1}),
    # Lightning says that it does not shuffle what is overfitted.
    Limit(lambda fit: fit.overfit > 0, {"shuffle": False}),
    # What a setting does not act on has one value.
    Limit(lambda fit: fit.clip is None, {"clip_by": "norm"}),
    Limit(lambda fit: fit.copies in ("none", "teacher"), {"moved_in": "on_train_batch_end"}),
)
"""What is left out, with the cause: limits of plain Lightning, and settings that mean nothing together."""


def limited(fit: Fit) -> Fit:
    """Returns the fit with what `LIMITS` puts in place of what does not go together."""
    for limit in LIMITS:
        if limit.holds(fit):
            fit = replace(fit, **limit.instead)
    return fit


def draw_fit(seed: str) -> Fit:
    """Draws a fit.

    Args:
        seed: Decides all of it.
    """
    random = Random(seed)
    drawn = {name: random.choice(values) for name, values in CHOICES.items()}
    return limited(Fit(seed=random.randrange(1000), **drawn))
