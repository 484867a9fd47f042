"""After fit the module is its own again with the adapter merged, and everything that comes later still works."""

import copy
import pickle
import re
import subprocess
import sys
import warnings

import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, MergeError, StateError
from lora_plugins.inplace import unwrapped
from lora_plugins.integrations.lightning import LoraCallback
from lora_plugins.integrations.lightning.checkpoint import KEY
from lora_plugins.integrations.lightning.module import merge_reversibly, plain_state_dict, temporarily_merged
from tests.integrations.lightning.toys import CONFIG, Classifier, Renames, differing, load, loader, trainer, values
from tests.state.interrupted import differences, every_line, passed, picture, stopped


def fitted(tmp_path, module=None, config=CONFIG, epochs=3, **options):
    module = module or Classifier(lr=0.3)
    saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss", save_top_k=-1)
    run = trainer(tmp_path, [LoraCallback(config, **options), saver], max_epochs=epochs)
    run.fit(module, loader(), loader())
    return run, module, saver


def loss(run, module, **options):
    return run.test(module, loader(), verbose=False, **options)[0]["val/loss"]


def logged(saver, path):
    return float(saver.best_k_models[path])


def test_module_has_its_own_classes_and_keys_again(tmp_path):
    _, module, _ = fitted(tmp_path)
    fresh = Classifier()
    assert [type(m) for m in module.modules()] == [type(m) for m in fresh.modules()]
    assert values(module).keys() == values(fresh).keys()
    assert differing(values(module), values(fresh)) == {"net.0.weight", "net.3.weight"}
    assert all(p.requires_grad for p in module.parameters())


def test_saved_after_fit_is_a_plain_file(tmp_path):
    run, module, _ = fitted(tmp_path)
    run.save_checkpoint(tmp_path / "merged.ckpt")
    assert KEY not in load(tmp_path / "merged.ckpt")
    assert not differing(values(Classifier.load_from_checkpoint(tmp_path / "merged.ckpt")), values(module))


# The merged weight is rounded once, so a loss may differ from the unmerged one in its last digits.
CLOSE = {"rel": 1e-5}


class TestAfterFit:
    def test_without_a_checkpoint_the_merged_weights_are_tested(self, tmp_path):
        run, module, saver = fitted(tmp_path)
        assert loss(run, module) == pytest.approx(
            logged(saver, saver.last_model_path or list(saver.best_k_models)[-1]), **CLOSE
        )

    @pytest.mark.parametrize("which", ["best", "each"])
    def test_with_a_checkpoint_its_logged_metric_comes_out(self, tmp_path, which):
        run, module, saver = fitted(tmp_path)
        paths = [saver.best_model_path] if which == "best" else list(saver.best_k_models)
        for path in paths:
            given = "best" if which == "best" else path
            assert loss(run, module, ckpt_path=given) == pytest.approx(logged(saver, path), rel=1e-6)
            assert loss(run, module, ckpt_path=given) == pytest.approx(logged(saver, path), rel=1e-6)

    def test_validate_and_predict_too(self, tmp_path):
        run, module, saver = fitted(tmp_path)
        found = run.validate(module, loader(), ckpt_path="best", verbose=False)[0]["val/loss"]
        assert found == pytest.approx(float(saver.best_model_score), rel=1e-6)
        assert len(run.predict(module, loader(), ckpt_path="best")) == 4

    def test_second_fit_goes_on_from_the_adapter_not_from_the_merged_weights(self, tmp_path):
        run, module, _ = fitted(tmp_path, epochs=1)
        run.fit_loop.max_epochs = 2
        run.fit(module, loader(), loader())
        unmerged = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], max_epochs=1)
        twin = Classifier(lr=0.3)
        torch.manual_seed(0)
        unmerged.fit(twin, loader(), loader())
        unmerged.fit_loop.max_epochs = 2
        unmerged.fit(twin, loader(), loader())
        LoraModel(twin).merge_and_unload()
        assert not differing(values(module), values(twin))

    def test_fit_on_after_loading_the_best(self, tmp_path):
        run, module, _ = fitted(tmp_path)
        loss(run, module, ckpt_path="best")
        run.fit_loop.max_epochs = 4
        run.fit(module, loader(), loader())
        assert differing(values(module), values(Classifier())) == {"net.0.weight", "net.3.weight"}

    def test_merged_module_in_a_new_process_of_thought_is_another_base(self, tmp_path):
        _, module, saver = fitted(tmp_path)
        with pytest.raises(AdapterFileError, match="another base"):
            trainer(tmp_path, [LoraCallback(CONFIG)]).test(module, loader(), ckpt_path=saver.best_model_path)


def test_best_weights_are_merged_when_asked_for(tmp_path):
    class Worsening(Classifier):
        """Its rate grows until it diverges, so the last weights are not the best ones."""

        def configure_optimizers(self):
            optimizer = torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=40.0)]

    run, module, saver = fitted(
        tmp_path, Worsening(), merge_source="best", save_adapter_to=str(tmp_path / "adapter"), epochs=4
    )
    assert saver.best_model_path != list(saver.best_k_models)[-1]
    assert loss(run, module) == pytest.approx(float(saver.best_model_score), **CLOSE)
    again = Worsening()
    LoraModel.load_adapter(again, tmp_path / "adapter")
    found = loss(trainer(tmp_path, []), again)
    assert found == pytest.approx(float(saver.best_model_score), rel=1e-6)


class TwoNets(Classifier):
    """Computes with a second network after the first."""

    def __init__(self, **options):
        super().__init__(**options)
        self.second = nn.Sequential(nn.Linear(3, 3))
        nn.init.eye_(self.second[0].weight)
        nn.init.zeros_(self.second[0].bias)

    def forward(self, x):
        return self.second(self.net(x))


class TestTwoTargets:
    def fit(self, tmp_path, names=("net", "second"), sources=("best", "best")):
        options = {"target_modules": "all", "r": 2}
        adapters = [
            LoraCallback(LoraConfig(**options), target=name, merge_source=source, save_adapter_to=str(tmp_path / name))
            for name, source in zip(names, sources, strict=True)
        ]
        saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss", save_top_k=-1)
        run = trainer(tmp_path, [*adapters, saver], max_epochs=3)
        run.fit(module := TwoNets(lr=0.3), loader(), loader())
        return run, module, saver

    @pytest.mark.parametrize("names", [("net", "second"), ("second", "net")], ids=" then ".join)
    def test_the_best_weights_of_both_are_merged(self, tmp_path, names):
        run, module, saver = self.fit(tmp_path, names)
        assert [type(m) for m in module.modules()] == [type(m) for m in TwoNets().modules()]
        assert loss(run, module) == pytest.approx(float(saver.best_model_score), **CLOSE)
        again = TwoNets()
        for name in names:
            LoraModel.load_adapter(getattr(again, name), tmp_path / name).merge_and_unload()
        assert not differing(values(again), values(module))

    def test_one_module_has_the_weights_of_one_moment(self, tmp_path):
        with pytest.raises(
            ConfigError, match=r"one moment, and merge_source differs: 'last' of 'default', 'best' of 'default'"
        ):
            self.fit(tmp_path, sources=("last", "best"))


class LeavesOut(Classifier):
    """Leaves a buffer out of its files, and does not miss it."""

    strict_loading = False

    def __init__(self, **options):
        super().__init__(**options)
        self.register_buffer("seen", torch.zeros(1))

    def on_save_checkpoint(self, checkpoint):
        checkpoint["state_dict"].pop("seen")


@pytest.mark.parametrize("cls", [Renames, LeavesOut])
def test_best_weights_are_loaded_as_the_module_loads_its_files(tmp_path, cls):
    run, module, saver = fitted(tmp_path, cls(lr=0.3), merge_source="best")
    assert "on_load_checkpoint" not in vars(module)
    assert loss(run, module) == pytest.approx(float(saver.best_model_score), **CLOSE)


def test_best_without_a_monitor_is_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match="monitor"):
        trainer(tmp_path, [LoraCallback(CONFIG, merge_source="best"), ModelCheckpoint(tmp_path)]).fit(
            Classifier(), loader()
        )


class TestNoBestCheckpoint:
    def fit(self, tmp_path, **options):
        saver = ModelCheckpoint(tmp_path, monitor="val/loss")
        lora = LoraCallback(CONFIG, merge_source="best", save_adapter_to=str(tmp_path / "adapter"))
        trainer(tmp_path, [lora, saver], **options).fit(module := Classifier(), loader(), loader())
        assert values(module).keys() == values(Classifier()).keys()
        return module

    def test_debugging_run(self, tmp_path):
        self.fit(tmp_path, fast_dev_run=True)

    @pytest.mark.filterwarnings("ignore:`ModelCheckpoint.*could not find the monitored key:UserWarning")  # that is it
    @pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"max_steps": 0}], ids=["validation", "training"])
    def test_last_weights_are_taken(self, tmp_path, options):
        with pytest.warns(UserWarning, match="no checkpoint was written.*last weights are taken"):
            module = self.fit(tmp_path, **options)
        again = Classifier()
        LoraModel.load_adapter(again, tmp_path / "adapter").merge_and_unload()
        assert not differing(values(again), values(module))


class TestFiles:
    def test_export_loads_strictly_where_no_lora_is_installed(self, tmp_path):
        _, module, _ = fitted(
            tmp_path, config=LoraConfig(r=2), target="net", export_to=str(tmp_path / "merged.safetensors")
        )
        code = (
            "import sys, torch, safetensors.torch\n"
            "from torch import nn\n"
            "net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3), nn.Dropout(0.0))\n"
            "net.load_state_dict(safetensors.torch.load_file(sys.argv[1]), strict=True)\n"
            "torch.set_num_threads(1)\n"
            "torch.save(net.eval()(torch.ones(2, 4)), sys.argv[2])\n"
            "assert 'lora_plugins' not in sys.modules\n"
        )
        command = [sys.executable, "-c", code, tmp_path / "merged.safetensors", tmp_path / "out.pt"]
        subprocess.run(command, check=True, timeout=60)
        assert torch.equal(torch.load(tmp_path / "out.pt"), module.eval()(torch.ones(2, 4)))

    def test_export_leaves_the_adapter_on_when_nothing_is_to_be_merged(self, tmp_path):
        path = tmp_path / "merged.safetensors"
        _, module, _ = fitted(tmp_path, merge_on_fit_end=False, export_to=str(path))
        assert LoraModel(module).active_adapters == ("default",)
        LoraModel(module).merge_and_unload()
        assert not differing(values(module), safetensors.torch.load_file(path))

    def test_adapter_folder_is_the_cores_own(self, tmp_path, capsys):
        _, module, _ = fitted(tmp_path, save_adapter_to=str(tmp_path / "adapter"))
        assert f"Adapter: {tmp_path / 'adapter'}" in capsys.readouterr().out
        again = Classifier()
        LoraModel.load_adapter(again, tmp_path / "adapter").merge_and_unload()
        assert not differing(values(module), values(again))

    def test_tied_weights_are_exported_under_both_names(self, tmp_path):
        class Tied(Classifier):
            def __init__(self):
                super().__init__()
                self.other = nn.Linear(4, 16)
                self.other.weight = self.net[0].weight

        path = tmp_path / "merged.safetensors"
        config = LoraConfig(r=2, target_modules=["net.0", "other"])
        fitted(tmp_path, Tied(), config=config, export_to=str(path))
        found = safetensors.torch.load_file(path)
        assert torch.equal(found["other.weight"], found["net.0.weight"])

    def test_fast_dev_run_writes_nothing(self, tmp_path):
        lora = LoraCallback(CONFIG, save_adapter_to=str(tmp_path / "adapter"))
        trainer(tmp_path, [lora], fast_dev_run=1).fit(Classifier(), loader())
        assert not (tmp_path / "adapter").exists()

    def test_what_is_no_tensor_is_refused_before_training(self, tmp_path):
        class KeepsMore(nn.Linear):
            def get_extra_state(self):
                return {"calls": 0}

            def set_extra_state(self, state):
                pass

        module = Classifier()
        module.net[3].__class__ = KeepsMore
        export = str(tmp_path / "merged.safetensors")
        with pytest.raises(StateError, match=r"'net\.3\._extra_state' of the state dict of Classifier"):
            trainer(tmp_path, [LoraCallback(CONFIG, export_to=export)]).fit(module, loader())

    @pytest.mark.parametrize("dtype", [torch.complex128, torch.float8_e8m0fnu], ids=str)
    def test_what_safetensors_does_not_bring_back_is_refused_before_training(self, tmp_path, dtype):
        module = Classifier()
        module.net[3].register_buffer("scale", torch.zeros(16, dtype=torch.uint8).view(dtype))
        export = str(tmp_path / "merged.safetensors")
        with pytest.raises(StateError, match=rf"'net\.3\.scale' of the state dict of Classifier are '{dtype}'"):
            trainer(tmp_path, [LoraCallback(CONFIG, export_to=export)]).fit(module, loader())

    def test_other_ending_is_refused(self):
        with pytest.raises(ConfigError, match=r"\.safetensors"):
            LoraCallback(CONFIG, export_to="merged.bin")


class TestHeadsAndBiases:
    """What is trained in place stays after the merge and comes back with the adapter."""

    config = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"], bias="lora_only", norm="track")

    def test_merge_keeps_them_and_taking_it_back_is_exact(self, tmp_path):
        run, module, saver = fitted(tmp_path, config=self.config)
        last = list(saver.best_k_models)[-1]
        assert loss(run, module) == pytest.approx(logged(saver, last), **CLOSE)
        for path in saver.best_k_models:
            assert loss(run, module, ckpt_path=path) == pytest.approx(logged(saver, path), rel=1e-6)
        run.callbacks[0].undo_merge(module)
        assert not differing(values(LoraModel(module).unload()), values(Classifier()))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
@pytest.mark.parametrize("init", ["loftq", "olora", "pissa"])
class TestBaseThatTheInitChangedAndTheTrainerCast:
    """What an init makes of a weight cannot be computed from the weight in another type."""

    def fitted(self, tmp_path, init, precision, **options):
        saver = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/loss", save_top_k=-1)
        lora = LoraCallback(LoraConfig(r=2, target_modules=["net.0", "net.3"], init=init), **options)
        run = trainer(tmp_path, [lora, saver], precision=precision)
        run.fit(module := Classifier(), loader(), loader())
        return run, module, saver, lora

    def test_checkpoints_are_tested_after_the_merge(self, tmp_path, init, precision):
        run, module, saver, _ = self.fitted(tmp_path, init, precision)
        for path in saver.best_k_models:
            assert loss(run, module, ckpt_path=path) == pytest.approx(logged(saver, path), **CLOSE)

    def test_export_leaves_the_adapter_and_the_merge_is_taken_back(self, tmp_path, init, precision):
        options = {"export_to": str(tmp_path / "merged.safetensors"), "max_error": 1.0}
        _, module, _, lora = self.fitted(tmp_path, init, precision, **options)
        assert not differing(values(module), safetensors.torch.load_file(tmp_path / "merged.safetensors"))
        lora.undo_merge(module)
        again = copy.deepcopy(module)
        LoraModel(again).merge_and_unload()
        assert not differing(values(again), safetensors.torch.load_file(tmp_path / "merged.safetensors"))
        base = {key: value.to(module.state_dict()[key].dtype) for key, value in values(Classifier()).items()}
        assert not differing(values(LoraModel(module).unload()), base)


@pytest.mark.parametrize(
    "wrapped",
    [lambda net: torch.compile(net, backend="eager"), checkpoint_wrapper],
    ids=["compiled", "checkpointed"],
)
def test_is_taken_back_where_a_part_was_wrapped_since(tmp_path, wrapped):
    run, module, _ = fitted(tmp_path, config=LoraConfig(r=2, target_modules=["0", "3"]))
    module.net = wrapped(module.net)
    run.callbacks[0].undo_merge(module)
    assert LoraModel(module).active_adapters == ("default",)
    LoraModel(module).unload()
    module.net = unwrapped(module.net)
    assert not differing(values(module), values(Classifier()))


def test_module_is_clean_after_fit(tmp_path):
    run, module, _ = fitted(tmp_path)
    assert vars(module).keys() == vars(Classifier()).keys()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not differing(values(copied), values(module))
    pickle.loads(pickle.dumps(run.callbacks[0]))


def test_adapted_module_is_clean_after_fit(tmp_path):
    _, module, _ = fitted(tmp_path, merge_on_fit_end=False)
    assert vars(module).keys() - vars(Classifier()).keys() == {"_lora_model"}
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert not differing(values(copied), values(module))


@pytest.mark.filterwarnings("ignore:.*did not move:UserWarning")  # that is the point
class TestLittleLearned:
    @pytest.mark.parametrize("lr", [1e-30, 1e-12, 1e-8])
    @pytest.mark.parametrize("options", [{}, {"export_to": "merged.safetensors"}], ids=["merge", "export"])
    def test_in_float32(self, tmp_path, lr, options):
        options = {key: str(tmp_path / name) for key, name in options.items()}
        fitted(tmp_path, Classifier(lr=lr), **options)

    def test_fast_dev_run_in_bfloat16(self, tmp_path):
        run = trainer(tmp_path, [LoraCallback(CONFIG)], fast_dev_run=1, precision="bf16-true")
        run.fit(module := Classifier(lr=1e-4), loader(), loader())
        assert values(module).keys() == values(Classifier()).keys()

    @pytest.mark.parametrize("exported", [False, True], ids=["merge", "export"])
    def test_what_to_set_and_what_is_saved_is_told(self, tmp_path, exported):
        saved = str(tmp_path / "adapter")
        export = {"merge_on_fit_end": False, "export_to": str(tmp_path / "merged.safetensors")} if exported else {}
        lora = LoraCallback(CONFIG, save_adapter_to=saved, **export)
        said = r"argument of the LoraCallback; merge_on_fit_end=False and export_to=None .*\. The adapter is saved: "
        with pytest.raises(MergeError, match=said + re.escape(repr(saved))):
            trainer(tmp_path, [lora], max_epochs=1, precision="bf16-true").fit(Classifier(lr=1e-4), loader())
        LoraModel.load_adapter(Classifier().bfloat16(), saved)

    def test_nothing_is_saved_in_a_debugging_run(self, tmp_path):
        class Diverges(Classifier):
            def configure_optimizers(self):
                return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=1e38)

        callback = LoraCallback(CONFIG, save_adapter_to=str(tmp_path / "adapter"))
        with pytest.raises(MergeError, match="not finite") as refused:
            trainer(tmp_path, [callback], fast_dev_run=3).fit(Diverges(), loader())
        assert "The adapter is saved" not in str(refused.value)

    def test_max_error_is_an_argument(self, tmp_path):
        def fit(**options):
            run = trainer(tmp_path, [LoraCallback(CONFIG, **options)], max_epochs=1, precision="bf16-true")
            run.fit(module := Classifier(lr=1e-4), loader())
            return module

        with pytest.raises(MergeError, match=r"torch\.bfloat16.*max_error"):
            fit()
        assert values(fit(max_error=1.0)).keys() == values(Classifier()).keys()

    def test_that_is_no_share_is_refused(self):
        with pytest.raises(ConfigError, match="max_error is a share, a number of at least 0, not -1"):
            LoraCallback(CONFIG, max_error=-1)


@pytest.mark.parametrize("late", ["setup", "configure_model"])
def test_module_that_is_built_again_for_every_fit(tmp_path, late):
    from tests.integrations.lightning.checkpoint.checkpoint_cases import Late

    def build(self, *_, **__):
        self.net = Classifier().net

    module = type("Rebuilt", (Late,), {late: build})()
    lora = LoraCallback(CONFIG)
    run = trainer(tmp_path, [lora], max_epochs=1)
    run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert values(module).keys() == values(Classifier()).keys()


def by_hook(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        return nn.utils.weight_norm(layer)


HEADS = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"], bias="lora_only", norm="track")


@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, by_hook], ids=["new", "old"])
class TestWeightNorm:
    """Its weights are computed, from a length and a direction that can hold any: the merge leaves it in place."""

    def make(self, normalize):
        module = Classifier(lr=0.3)
        normalize(module.net[0])
        return module

    def test_merged_it_computes_what_the_adapted_one_did(self, tmp_path, normalize):
        fresh, x, found = self.make(normalize), torch.randn(4, 4), []
        for merge in (False, True):
            torch.manual_seed(1)
            module = self.make(normalize)
            export = str(tmp_path / "merged.safetensors") if merge else None
            run = trainer(tmp_path, [LoraCallback(HEADS, merge_on_fit_end=merge, export_to=export)])
            run.fit(module, loader())
            found.append(module.eval()(x).detach())
        torch.testing.assert_close(found[1], found[0])
        assert not torch.allclose(found[1], fresh.eval()(x))
        assert [*values(module)] == [*values(fresh)]
        assert [type(part).__name__ for part in module.modules()] == [type(part).__name__ for part in fresh.modules()]
        fresh.load_state_dict(safetensors.torch.load_file(export))
        torch.testing.assert_close(fresh.eval()(x), found[1])

    def test_taken_back_bit_for_bit_and_trained_again(self, tmp_path, normalize):
        module, callback = self.make(normalize), LoraCallback(HEADS)
        trainer(tmp_path, [callback]).fit(module, loader())
        trainer(tmp_path, [callback]).fit(module, loader())
        callback.undo_merge(module)
        assert not differing(values(LoraModel(module).unload()), values(self.make(normalize)))

    def test_rows_of_zeros(self, tmp_path, normalize):
        module = self.make(normalize)
        with torch.no_grad():
            next(p for name, p in module.net[0].named_parameters() if name.endswith(("_g", "original0")))[0] = 0
        trainer(tmp_path, [LoraCallback(CONFIG, max_error=9)]).fit(module, loader())
        assert all(value.isfinite().all() for value in values(module).values())

    def test_trains_saves_and_merges_by_hand(self, tmp_path, normalize):
        module = self.make(normalize)
        trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)]).fit(module, loader())
        module.eval()
        x = torch.randn(4, 4)
        expected = module(x).detach()
        torch.testing.assert_close(LoraModel(module).merge_and_unload()(x).detach(), expected)
        assert type(module.net[0]) is nn.Linear


@pytest.mark.parametrize("options", [{}, {"merge_on_fit_end": False, "export_to": "x.safetensors"}])
@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
@pytest.mark.filterwarnings("ignore:.*spectral_norm. is deprecated:FutureWarning")
def test_a_merge_that_ends_a_computation_for_good_is_refused_before_training(tmp_path, normalize, options):
    steps = []
    module = Classifier()
    normalize(module.net[0])
    module.on_train_batch_start = lambda *_: steps.append(1)
    with pytest.raises(StateError, match=r"'net\.0' are computed.*merge_on_fit_end=False"):
        trainer(tmp_path, [LoraCallback(CONFIG, **options)]).fit(module, loader())
    assert not steps


@pytest.mark.parametrize("hold", [nn.Module.register_buffer, setattr], ids=["buffer", "attribute"])
def test_a_merge_that_no_call_makes_for_good_is_refused_before_training(tmp_path, hold):
    steps = []
    module = Classifier()
    weight = module.net[0].weight.detach()
    del module.net[0].weight
    hold(module.net[0], "weight", weight)
    module.on_train_batch_start = lambda *_: steps.append(1)
    with pytest.raises(StateError, match=r"'net\.0\.weight': not a parameter.*, add its layer to exclude_modules"):
        trainer(tmp_path, [LoraCallback(CONFIG)]).fit(module, loader())
    assert not steps
    trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)]).fit(module, loader())
    assert len(steps) > 1


class Logits(nn.Sequential):
    """Names its output."""

    def forward(self, x):
        return {"logits": super().forward(x)}


def stop_everywhere(again, act, x, points=12):
    lines = every_line(passed(lambda: act(again())))
    for at in lines[:: max(1, len(lines) // points)]:
        target, expected = again(), picture(again(), (x,))
        where, raised = stopped(lambda target=target: act(target), at)
        assert not raised or not differences(picture(target, (x,)), expected), where
        if raised:
            act(target)


def adapted(options, normalize):
    target = Logits(*Classifier().net).eval()
    if normalize:
        normalize(target[0])
    lora = LoraModel(target, LoraConfig(**{"r": 2, "target_modules": ["0"], **options}))
    with torch.no_grad():
        for parameter in (p for p in target.parameters() if p.requires_grad):
            parameter.add_(0.1)
    assert lora.adapters
    return target


@pytest.mark.parametrize("points", [6, pytest.param(120, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("options", "normalize"),
    [
        ({}, None),
        ({"modules_to_save": ["3"], "bias": "all"}, None),
        ({"init": "pissa"}, None),
        ({"variant": "dora"}, None),
        ({"quantize": "nf4", "quantize_options": {"min_size": 0}}, None),
        ({}, nn.utils.parametrizations.weight_norm),
    ],
    ids=["plain", "heads", "changed", "dora", "stored", "weight norm"],
)
class TestInterrupted:
    """A call that is stopped at one of its lines leaves the module as it was, and can be made again."""

    def test_merge(self, options, normalize, points):
        stop_everywhere(
            lambda: adapted(options, normalize),
            lambda target: merge_reversibly(target, dequantize=True),
            torch.randn(4, 4),
            points,
        )

    def test_undo(self, options, normalize, points):
        merges = {}

        def merged():
            target = adapted(options, normalize)
            merges[target] = merge_reversibly(target, dequantize=True)
            return target

        stop_everywhere(merged, lambda target: merges[target].undo(target), torch.randn(4, 4), points)


def test_interrupted_export_leaves_the_adapter_on():
    def export(target):
        with temporarily_merged(target, 0.01, dequantize=False):
            plain_state_dict(target)

    stop_everywhere(lambda: adapted({}, None), export, torch.randn(4, 4))
