"""Inits that learn from data, in the callback: before optimizers, without a trace, and not again on resume."""

import random

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from lora_plugins import ConfigError, InitData, LoraConfig, LoraModel, StateError
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import Classifier, differing, load, loader, trainer, values

CONFIGS = {
    "eva": LoraConfig(r=2, target_modules=["net.0", "net.3"], init="eva"),
    "eva-rho": LoraConfig(r=2, target_modules=["net.0", "net.3"], init="eva", init_options={"rho": 1.5}),
    "lora_ga": LoraConfig(r=1, target_modules=["net.0", "net.3"], init="lora_ga"),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def callback(config, **options) -> LoraCallback:
    return LoraCallback(config, **{"print_plan": False, "merge_on_fit_end": False, **options})


def direct(config, limit=None) -> LoraModel:
    """What plain PyTorch makes of the same module and batches."""
    module = Classifier()
    step = lambda module, batch: cross_entropy(module(batch[0]), batch[1])  # noqa: E731
    return LoraModel(module, config, init_data=InitData(loader(), step, limit))


class Drawn(Dataset):
    """Samples that each reading draws anew, in a worker."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.randn(4), index % 3


class Noticing(Classifier):
    """Counts, measures, logs and draws in its training step, and says when that was not part of training."""

    def __init__(self):
        super().__init__(dropout=0.3)
        self.accuracy = MulticlassAccuracy(3)
        self.steps, self.random = [], []

    def training_step(self, batch, batch_idx):
        self.steps.append((batch_idx, self.training, self.net[1].training))
        self.accuracy(self(batch[0]), batch[1])
        self.log("train/accuracy", self.accuracy)
        self.log_dict({"train/one": 1.0})
        self.logger.log_metrics({"by_hand": 1.0})
        self.random.append((torch.rand(()).item(), random.random()))
        return super().training_step(batch, batch_idx)

    def on_train_start(self):
        assert not self.steps
        assert self.accuracy.update_count == 0


class TestStart:
    @configs
    @pytest.mark.parametrize("batches", [2, 32])
    def test_is_that_of_plain_pytorch(self, config, batches, tmp_path):
        module, expected = Classifier(), direct(config, batches)
        lora = callback(config, init_batches=batches)
        trainer(tmp_path, [lora], max_steps=0).fit(module, loader())
        found = LoraModel(module)
        assert found.plans["default"].layers == expected.plans["default"].layers
        assert not differing(values(module), values(expected.model))

    @configs
    def test_of_a_compiled_module(self, config, tmp_path):
        module = Classifier()
        trainer(tmp_path, [callback(config)], max_steps=0).fit(torch.compile(module, backend="eager"), loader())
        assert not differing(values(module), values(direct(config).model))

    @configs
    def test_trains_what_the_optimizer_has(self, config, tmp_path):
        module = Classifier()
        run = trainer(tmp_path, [callback(config)], max_epochs=1)
        run.fit(module, loader())
        held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
        assert held == {id(p) for p in module.parameters() if p.requires_grad}
        assert differing(values(module), values(direct(config).model)) >= {
            "net.0.lora_A.default",
            "net.3.lora_B.default",
        }

    @configs
    def test_leaves_no_trace(self, config, tmp_path):
        """A run whose init is the same, but given, is the same in everything that it draws, logs and measures."""
        runs = []
        for given in (False, True):
            torch.manual_seed(5)
            random.seed(5)
            module = Noticing()
            lora = callback(config)
            if given:
                step = lambda module, batch: cross_entropy(module(batch[0]), batch[1])  # noqa: E731
                LoraModel(module, config, init_data=InitData(loader(), step))
                assert not module.random
            logger = CSVLogger(tmp_path / str(given))
            trainer(tmp_path, [lora], logger=logger, log_every_n_steps=1, max_epochs=1).fit(module, loader())
            runs.append((module.steps, module.random, (tmp_path / str(given)).rglob("metrics.csv")))
        (steps, drawn, first), (other_steps, other_drawn, second) = runs
        assert steps == other_steps == [(index, True, False) for index in range(4)]
        assert drawn == other_drawn
        rows = [next(path).read_text().splitlines() for path in (first, second)]
        assert [row.count(",") for row in rows[0]] == [row.count(",") for row in rows[1]]
        assert "by_hand" in rows[0][0]

    def test_does_not_move_the_loaders_own_generator(self, tmp_path):
        states = []
        for config in (CONFIGS["eva"], LoraConfig(r=2)):
            generator = torch.Generator().manual_seed(3)
            data = DataLoader(loader().dataset, batch_size=8, shuffle=True, generator=generator)
            trainer(tmp_path, [callback(config)], max_epochs=1).fit(Classifier(), data)
            states.append(generator.get_state())
        assert torch.equal(*states)

    def test_workers_that_stay_draw_as_they_would_have(self, tmp_path):
        class Seeing(Classifier):
            def training_step(self, batch, batch_idx):
                seen.append(batch[0])
                return super().training_step(batch, batch_idx)

        runs = []
        for config in (CONFIGS["eva"], LoraConfig(r=2)):
            torch.manual_seed(5)
            seen = []
            data = DataLoader(Drawn(), batch_size=8, num_workers=1, persistent_workers=True)
            trainer(tmp_path, [callback(config, init_batches=1)], max_epochs=1).fit(Seeing(), data)
            runs.append(torch.cat(seen[-2:]))
        assert torch.equal(*runs)

    def test_several_loaders(self, tmp_path):
        class Two(Classifier):
            def training_step(self, batch, batch_idx):
                return super().training_step(batch["a"], batch_idx) + super().training_step(batch["b"], batch_idx)

        module = Two()
        trainer(tmp_path, [callback(CONFIGS["eva"])], max_steps=0).fit(module, {"a": loader(), "b": loader(16)})
        assert module.net[0].lora_A["default"].any()

    @pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
    @pytest.mark.parametrize("config", [CONFIGS["eva"], CONFIGS["lora_ga"]], ids=["eva", "lora_ga"])
    def test_every_precision(self, config, precision, tmp_path):
        module, expected = Classifier(), direct(config).model
        run = trainer(tmp_path, [callback(config)], max_steps=0, precision=precision)
        run.fit(module, loader())
        for key, value in values(expected).items():
            # A singular vector has either sign; bfloat16 has two to three digits.
            tolerance = {"rtol": 0.05, "atol": 0.05} if precision == "bf16-true" else {"rtol": 1e-3, "atol": 1e-4}
            torch.testing.assert_close(module.state_dict()[key].abs().to(value), value.abs(), **tolerance)

    def test_a_target_inside_the_module(self, tmp_path):
        module, expected = Classifier(), direct(CONFIGS["lora_ga"])
        config = LoraConfig(r=1, target_modules=["0", "3"], init="lora_ga")
        trainer(tmp_path, [callback(config, target="net")], max_steps=0).fit(module, loader())
        # The seed of a layer comes from its name, and only the randomized decomposition draws from it.
        found, wanted = values(module), values(expected.model)
        assert found.keys() == wanted.keys()
        for key, value in found.items():
            torch.testing.assert_close(value.abs(), wanted[key].abs(), rtol=1e-3, atol=1e-3)

    def test_beside_an_adapter_that_needs_no_data(self, tmp_path):
        module = Classifier()
        first = callback(LoraConfig(r=2, target_modules=["net.0"]), adapter_name="plain")
        second = callback(LoraConfig(r=2, target_modules=["net.3"], init="eva"), adapter_name="learned")
        run = trainer(tmp_path, [first, second], max_epochs=1)
        run.fit(module, loader())
        assert LoraModel(module).active_adapters == ("plain", "learned")
        assert not {"setup", "configure_model", "configure_optimizers"} & vars(module).keys()
        assert "setup" not in vars(run.strategy)

    def test_layers_that_configure_model_builds(self, tmp_path):
        class Late(Classifier):
            def configure_model(self):
                if self.net is None:
                    self.net = Classifier().net

        module = Late()
        module.net = None
        trainer(tmp_path, [callback(CONFIGS["eva"])], max_epochs=1).fit(module, loader())
        assert module.net[0].lora_B["default"].any()

    @pytest.mark.filterwarnings("ignore:Found 1 module.s. in eval mode:UserWarning")  # the frozen batch norm
    def test_a_tuner_that_restores_weights(self, tmp_path):
        module = Classifier()
        finder = LearningRateFinder(num_training_steps=5)
        trainer(tmp_path, [callback(CONFIGS["lora_ga"]), finder], max_epochs=1).fit(module, loader())
        start = values(direct(CONFIGS["lora_ga"]).model)
        assert torch.equal(values(module)["net.0.weight"], start["net.0.weight"])

    @pytest.mark.parametrize("averaging", [WeightAveraging, lambda: StochasticWeightAveraging(0.01)], ids=["wa", "swa"])
    def test_with_averaging(self, averaging, tmp_path):
        module = Classifier()
        trainer(tmp_path, [callback(CONFIGS["eva"]), averaging()]).fit(module, loader())
        assert module.net[0].lora_B["default"].any()


class TestResume:
    @configs
    def test_goes_on_bit_for_bit_without_reading_again(self, config, tmp_path):
        straight = Classifier()
        trainer(tmp_path, [callback(config)]).fit(straight, loader())
        half = trainer(tmp_path, [callback(config)], max_epochs=1)
        half.fit(Classifier(), loader())
        half.save_checkpoint(tmp_path / "half.ckpt")

        class OnceAnEpoch(Classifier):
            calls = 0

            def training_step(self, batch, batch_idx):
                OnceAnEpoch.calls += 1
                return super().training_step(batch, batch_idx)

        resumed = OnceAnEpoch()
        trainer(tmp_path, [callback(config)]).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
        assert OnceAnEpoch.calls == 4
        assert not differing(values(resumed), values(straight))

    @configs
    def test_with_weight_averaging(self, config, tmp_path):
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        straight = Classifier()
        trainer(tmp_path, [callback(config), EMAWeightAveraging(decay=0.5), saver]).fit(straight, loader())
        resumed = Classifier()
        run = trainer(tmp_path, [callback(config), EMAWeightAveraging(decay=0.5)])
        run.fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
        assert not differing(values(resumed), values(straight))

    @configs
    def test_a_second_fit_goes_on_with_the_adapter(self, config, tmp_path):
        module = Classifier()
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="half")
        run = trainer(tmp_path, [callback(config, merge_on_fit_end=True), checkpoint], max_epochs=1)
        run.fit(module, loader())
        run.fit_loop.max_epochs = 2
        run.fit(module, loader(), ckpt_path=tmp_path / "half.ckpt")
        straight = Classifier()
        trainer(tmp_path, [callback(config, merge_on_fit_end=True)]).fit(straight, loader())
        assert not differing(values(module), values(straight))

    @configs
    def test_a_file_loads_and_tests_without_data(self, config, tmp_path):
        checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="last")
        module = Classifier()
        run = trainer(tmp_path, [callback(config), checkpoint], max_epochs=1)
        run.fit(module, loader())
        path = tmp_path / "last.ckpt"
        assert not differing(values(load_from_checkpoint(Classifier, path)), values(module))
        fresh = Classifier()
        trainer(tmp_path, [callback(config)]).test(fresh, loader(), ckpt_path=path, verbose=False)
        assert not differing(values(fresh), values(module))
        assert "net.1.weight" not in load(path)["state_dict"]


class TestRefusals:
    def refused(self, module, config, error, match, tmp_path, data=None, **options):
        before = values(module)
        with pytest.raises(error, match=match):
            trainer(tmp_path, [callback(config)], **options).fit(module, loader() if data is None else data)
        assert not differing(values(module), before)
        assert not {"setup", "configure_model", "configure_optimizers"} & vars(module).keys()

    def test_manual_optimization(self, tmp_path):
        class Manual(Classifier):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

        self.refused(Manual(), CONFIGS["eva"], StateError, "optimizes by hand.*LoraModel", tmp_path)

    def test_a_module_that_cannot_be_copied(self, tmp_path):
        module = Classifier()
        module.cached = module.net[0](torch.ones(1, 4))  # no leaf of a graph, which torch does not copy
        self.refused(module, CONFIGS["eva"], StateError, "Classifier cannot be copied", tmp_path)

    def test_no_loss(self, tmp_path):
        class Silent(Classifier):
            def training_step(self, batch, batch_idx):
                return None

        self.refused(Silent(), CONFIGS["lora_ga"], ConfigError, "a NoneType instead of the loss", tmp_path)

    def test_a_training_step_that_needs_its_optimizer_says_when_it_failed(self, tmp_path):
        class Peeking(Classifier):
            def training_step(self, batch, batch_idx):
                self.optimizers().param_groups[0]["lr"]
                return super().training_step(batch, batch_idx)

        with pytest.raises(AttributeError) as raised:
            trainer(tmp_path, [callback(CONFIGS["eva"])]).fit(Peeking(), loader())
        assert "init 'eva' was shown training batches" in raised.value.__notes__[0]

    def test_no_batches_of_a_kind(self):
        with pytest.raises(ConfigError, match="init_batches"):
            LoraCallback(CONFIGS["eva"], init_batches=0)


@pytest.mark.parametrize("init", ["eva", "lora_ga"])
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*will be overridden by `LoraCLI.configure_optimizers`:UserWarning")
def test_from_the_command_line(init, tmp_path, capsys):
    """The optimizer of a YAML file is built before the module is adapted, and trains the adapter all the same."""
    config = {
        "seed_everything": 0,
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(tmp_path),
        },
        "model": {"class_path": "tests.integrations.lightning.toys.Classifier"},
        "data": {"class_path": "tests.integrations.lightning.toys.Data"},
        "lora": {"r": 1, "target_modules": ["net.0", "net.3"], "init": init},
        "lora_callback": {"init_batches": 2, "save_adapter_to": str(tmp_path / "adapter")},
        "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(path)]) == 0, capsys.readouterr().err
    torch.manual_seed(0)
    start = values(direct(CONFIGS["lora_ga"] if init == "lora_ga" else LoraConfig(**config["lora"]), 2).model)
    module = Classifier()
    LoraModel.load_adapter(module, tmp_path / "adapter")
    assert differing(values(module), start) >= {"net.0.lora_B.default", "net.3.lora_B.default"}
    assert torch.equal(values(module)["net.0.weight"], start["net.0.weight"])


class _Adds(Callback):
    """Adds a callback when a run is set up."""

    def __init__(self, added):
        self.added = added

    def setup(self, trainer, pl_module, stage):
        if self.added not in trainer.callbacks:
            trainer.callbacks.append(self.added)


def test_a_callback_that_is_added_in_setup_may_learn_from_data_alone(tmp_path):
    module = Classifier()
    first = callback(LoraConfig(r=2, target_modules=["net.0"]))
    later = callback(LoraConfig(r=2, target_modules=["net.3"], init="eva"), adapter_name="later")
    trainer(tmp_path, [first, _Adds(later)]).fit(module, loader())
    assert [*LoraModel(module).adapters] == ["default", "later"]
