"""A small file goes back onto the base, in a Trainer, or is refused."""

from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from lora_plugins.integrations.lightning.checkpoint import KEY
from tests.integrations.lightning.checkpoint.checkpoint_cases import ADAPTER_KEYS, PATHS, Late, by_trainer
from tests.integrations.lightning.toys import CONFIG, Classifier, differing, load, loader, lora, trainer, values


@pytest.mark.parametrize("save", PATHS.values(), ids=PATHS.keys())
def test_every_file_gives_the_trained_model_in_a_module_that_was_never_adapted(save, tmp_path):
    path = save(tmp_path)
    module = Classifier()
    trainer(tmp_path, [lora()]).test(module, loader(), ckpt_path=path, verbose=False)
    alone = load_from_checkpoint(Classifier, path)
    expected = load(path)["state_dict"]
    for loaded in (module, alone):
        assert {key: values(loaded)[key] for key in expected}.keys() == expected.keys()
        assert not differing({key: values(loaded)[key] for key in expected}, expected)
        assert loaded.strict_loading is True


class InSetup(Late):
    def setup(self, stage):
        self.build()


class InConfigureModel(Late):
    def configure_model(self):
        self.build()


class ReplacesHead(Classifier):
    """Puts in another head and loads pretrained weights strictly, as many scripts do."""

    def setup(self, stage):
        pretrained = Classifier(base_seed=3).net
        self.net[3] = nn.Linear(16, 3)
        self.net.load_state_dict(pretrained.state_dict(), strict=True)


@pytest.mark.parametrize("cls", [InSetup, InConfigureModel, ReplacesHead])
def test_layers_that_are_built_late(cls, tmp_path):
    module = cls()
    run = trainer(tmp_path, [lora()])
    run.fit(module, loader())
    assert {p for p, t in module.named_parameters() if t.requires_grad} == ADAPTER_KEYS
    assert all(p.abs().sum() > 0 for name, p in module.named_parameters() if ".lora_B." in name)
    run.save_checkpoint(tmp_path / "it.ckpt")
    again = cls()
    trainer(tmp_path, [lora()], max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "it.ckpt")
    base = {key for key in module.state_dict() if "lora" not in key}
    assert not base & differing(values(module), values(again))


class Versioned(nn.Linear):
    """Reads its values by the version of the layer that wrote them, as MNASNet of torchvision does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *more):
        assert local_metadata["version"] == 2
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


class OfVersions(Classifier):
    def __init__(self):
        super().__init__()
        self.net[3].__class__ = Versioned


def test_layers_are_told_their_version(tmp_path):
    path = by_trainer(tmp_path, cls=OfVersions)
    trainer(tmp_path, [lora()], max_epochs=3).fit(OfVersions(), loader(), ckpt_path=path)
    load_from_checkpoint(OfVersions, path)


LATE = {
    "learns from data": {"init": "eva"},
    "stores another base": {"init": "pissa", "quantize": "nf4", "quantize_options": {"min_size": 0}},
}
"""What of a config lets an adapter join after the checkpoint."""


@pytest.mark.parametrize("fields", [{}, *LATE.values()], ids=["at once", *LATE])
def test_a_test_asks_the_checkpoint_and_not_the_callback_what_is_adapted(fields, tmp_path):
    config = replace(CONFIG, **fields)
    run = trainer(tmp_path, [lora(config)])
    run.fit(Classifier(), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    expected = run.validate(run.lightning_module, loader(), verbose=False)
    other = trainer(tmp_path, [lora(config, target="nothing")])
    found = other.validate(Classifier(), loader(), ckpt_path=tmp_path / "it.ckpt", verbose=False)
    assert found == expected


class WithoutBias(Classifier):
    def __init__(self):
        super().__init__()
        self.net[3].bias = None


class TestRefused:
    """Each bad file stops before training, says what to do, and leaves the trainer usable."""

    def refused(self, tmp_path, path, match, module=None, **options):
        module = module or Classifier()
        run = trainer(tmp_path, [lora(**options)], max_epochs=4)
        before = values(module)
        with pytest.raises(AdapterFileError, match=match):
            run.fit(module, loader(), ckpt_path=path)
        assert {k for k in differing(before, values(module)) if k in before} == set()
        return run, module

    def test_resume_from_a_file_without_adapter(self, tmp_path):
        run = trainer(tmp_path, [])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "plain.ckpt")
        self.refused(tmp_path, tmp_path / "plain.ckpt", "holds no adapter.* then fit without ckpt_path.$")

    def test_resume_from_a_file_saved_after_the_merge(self, tmp_path):
        run = trainer(tmp_path, [LoraCallback(CONFIG)])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "merged.ckpt")
        self.refused(tmp_path, tmp_path / "merged.ckpt", "holds no adapter.* or fit with merge_on_fit_end=False")

    @pytest.mark.parametrize("init", ["kaiming", "pissa"])
    def test_other_rank(self, tmp_path, init):
        config = LoraConfig(r=2, target_modules=["net.0", "net.3"], init=init)
        run = trainer(tmp_path, [lora(config)])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        module = Classifier()
        with pytest.raises(AdapterFileError, match="r is 2 in the file and 3 here"):
            trainer(tmp_path, [lora(replace(config, r=3))], max_epochs=4).fit(
                module, loader(), ckpt_path=tmp_path / "it.ckpt"
            )
        LoraModel(module).unload()
        assert not differing(values(module), values(Classifier()))

    @pytest.mark.parametrize("fields", LATE.values(), ids=LATE)
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"config": {"r": 3}}, "r is 2 in the file and 3 here"),
            ({"adapter_name": "other"}, "'other on the module'.* adapter_name"),
            ({"config": {"target_modules": ["0", "3"]}, "target": "net"}, "'default on net'.* adapter_name and target"),
        ],
        ids=["rank", "name", "target"],
    )
    def test_before_an_adapter_joins_that_waits_for_the_file(self, fields, options, message, tmp_path):
        config = replace(CONFIG, **fields)
        run = trainer(tmp_path, [lora(config)])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        others = {**options, "config": replace(config, **options.get("config", {}))}
        _, module = self.refused(tmp_path, tmp_path / "it.ckpt", message, **others)
        assert values(module).keys() == values(Classifier()).keys()

    def test_the_second_of_two_leaves_the_first(self, tmp_path):
        def callbacks(**second):
            return [lora(adapter_name="a"), lora(adapter_name="b", config=replace(CONFIG, **second))]

        run = trainer(tmp_path, callbacks(r=3))
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        module = Classifier()
        trainer(tmp_path, callbacks(), max_epochs=3).fit(module, loader())
        before = values(module)
        with pytest.raises(AdapterFileError, match="adapter 'b' has another configuration"):
            trainer(tmp_path, callbacks(), max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "it.ckpt")
        assert not differing(before, values(module))

    def test_other_adapter(self, tmp_path):
        self.refused(tmp_path, by_trainer(tmp_path), "other.*adapter_name", adapter_name="other")

    def test_other_base_of_the_same_shape(self, tmp_path):
        self.refused(tmp_path, by_trainer(tmp_path), "another base", Classifier(base_seed=1))

    @pytest.mark.parametrize("init", ["kaiming", "pissa"])
    def test_an_adapter_that_was_trained_stays(self, tmp_path, init):
        """Whether its init changed the base, so that it is put on anew, or not."""
        config, other = LoraConfig(r=2, target_modules=["net.0", "net.3"], init=init), Classifier(base_seed=1)
        run = trainer(tmp_path, [lora(config)])
        run.fit(other, loader())
        run.save_checkpoint(tmp_path / "other.ckpt")
        module = Classifier()
        trainer(tmp_path, [lora(config)]).fit(module, loader())
        parameters = dict(module.named_parameters())
        self.refused(tmp_path, tmp_path / "other.ckpt", "another base", module, config=config)
        now = dict(module.named_parameters())
        assert now.keys() == parameters.keys()
        assert all(now[name] is parameter for name, parameter in parameters.items())

    @pytest.mark.parametrize(
        ("build", "fields", "message"),
        [
            (lambda: Classifier(width=8), {}, r"another model: 'lora/net\.0/lora_B' is \[16, 2\] in .* \[8, 2\]"),
            (
                WithoutBias,
                {"target_modules": ["net.0"], "modules_to_save": ["net.3"]},
                r"another model: 'value/net\.3\.bias' are only in one of them",
            ),
            (WithoutBias, {"target_modules": ["net.0"]}, r"another base: WithoutBias has no 'net\.3\.bias'"),
        ],
        ids=["width", "head", "frozen layer"],
    )
    def test_other_model(self, build, fields, message, tmp_path):
        config = replace(CONFIG, **fields)
        run = trainer(tmp_path, [lora(config)])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        self.refused(tmp_path, tmp_path / "it.ckpt", message, build(), config=config)

    def test_other_version_of_a_plugin(self, tmp_path):
        path = by_trainer(tmp_path)
        checkpoint = load(path)
        entry = checkpoint[KEY]["adapters"][0]["manifest"]["init"]
        entry |= {"distribution": "their-package", "version": "1.2"}
        torch.save(checkpoint, path)
        told = r"another base.* made with the init 'kaiming' of their-package 1\.2, and here is that of lora-plugins"
        self.refused(tmp_path, path, told, Classifier(base_seed=1))

    @pytest.mark.parametrize("missing", ["manifest", "tensors", "target", "active"])
    def test_damaged_entry(self, tmp_path, missing):
        path = by_trainer(tmp_path)
        checkpoint = load(path)
        del checkpoint[KEY]["adapters"][0][missing]
        torch.save(checkpoint, path)
        self.refused(tmp_path, path, "damaged")

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("format", 99, "format 99.*upgrade"),
            ("format", None, "damaged: it has no format version"),
            ("left_out", None, "damaged. Copy the file again"),
        ],
        ids=["newer", "no version", "no list"],
    )
    def test_entry_of_another_format(self, key, value, message, tmp_path):
        path = by_trainer(tmp_path)
        checkpoint = load(path)
        checkpoint[KEY][key] = value
        torch.save(checkpoint, path)
        self.refused(tmp_path, path, message)

    @pytest.mark.parametrize("size", [0, 100, -100], ids=["empty", "head_only", "tail_missing"])
    def test_truncated(self, tmp_path, size):
        path = by_trainer(tmp_path)
        path.write_bytes(path.read_bytes()[:size])
        self.refused(tmp_path, path, "truncated")

    def test_afterwards_the_same_trainer_tests_what_it_has(self, tmp_path):
        run, module = self.refused(tmp_path, by_trainer(tmp_path), "another base", Classifier(base_seed=1))
        expected = run.test(module, loader(), verbose=False)
        assert run.test(module, loader(), verbose=False) == expected
        reference = trainer(tmp_path, []).test(Classifier(base_seed=1), loader(), verbose=False)
        assert expected[0]["val/loss"] == pytest.approx(reference[0]["val/loss"], rel=1e-6)

    def test_test_with_another_base(self, tmp_path):
        path = by_trainer(tmp_path)
        module = Classifier(base_seed=1)
        run = trainer(tmp_path, [lora()])
        with pytest.raises(AdapterFileError, match="another base"):
            run.test(module, loader(), ckpt_path=path)
        assert type(module.net[0]) is nn.Linear

    def test_test_without_the_target(self, tmp_path):
        options = {"config": replace(CONFIG, target_modules=["0", "3"]), "target": "net"}
        run = trainer(tmp_path, [lora(**options)])
        run.fit(Classifier(), loader())
        run.save_checkpoint(tmp_path / "it.ckpt")
        module = Classifier()
        module.body = module.net
        del module.net
        with pytest.raises(AdapterFileError, match="has an adapter for 'net', which Classifier does not have"):
            run.test(module, loader(), ckpt_path=tmp_path / "it.ckpt")


def test_plain_file_in_test_takes_the_adapter_off(tmp_path):
    plain = trainer(tmp_path, [])
    plain.fit(Classifier(base_seed=2), loader())
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    module = Classifier()
    run = trainer(tmp_path, [lora()])
    run.fit(module, loader())
    run.test(module, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert not differing(values(module), load(tmp_path / "plain.ckpt")["state_dict"])


def test_two_callbacks_with_one_adapter_name_are_refused(tmp_path):
    with pytest.raises(RuntimeError, match="LoraCallback"):
        Trainer(callbacks=[lora(), lora()], logger=False, accelerator="cpu", default_root_dir=tmp_path)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_base_changed_by_an_init_and_cast_by_the_precision_is_rebuilt(tmp_path, init, precision):
    """The module is adapted in its own type, cast, and restored in its own type before it is cast again."""
    config = LoraConfig(r=2, target_modules=["net.0", "net.3"], init=init)

    def run(epochs):
        lora = LoraCallback(config, merge_on_fit_end=False, print_plan=False)
        return trainer(tmp_path, [lora], max_epochs=epochs, precision=precision)

    half = run(1)
    module = Classifier()
    half.fit(module, loader())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Classifier()
    run(1).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert not {name for name in differing(values(resumed), values(module)) if "lora_" not in name}
    LoraModel(resumed).unload()
    expected = {key: value.to(resumed.state_dict()[key]) for key, value in values(Classifier()).items()}
    assert not {name for name in differing(values(resumed), expected) if "net.1." not in name}
