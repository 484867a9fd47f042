"""A callback, Trainer or module used again: a merge is taken back onto the merged values only."""

import copy
import dataclasses
import logging

import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, StateError
from lora_plugins.inplace import named_tensors
from lora_plugins.integrations.lightning import LoraCallback, load_from_checkpoint
from tests.integrations.lightning.toys import (
    CONFIG,
    Classifier,
    HidesItsBackbone,
    Renames,
    differing,
    loader,
    trainer,
    values,
)
from tests.slow import thinned

HEADS = LoraConfig(r=2, target_modules=["net.0"], modules_to_save=["net.3"], bias="lora_only", norm="track")
KINDS = {"factors": CONFIG, "heads": HEADS}
CONFIGS = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def fit(tmp_path, module, callback, seed=3, **options):
    """Fits with the same random numbers whenever it is called, and returns the values that the module has then."""
    torch.manual_seed(seed)
    run = trainer(tmp_path, [callback], max_epochs=1, **options)
    run.fit(module, loader())
    return values(module)


def own_values(module):
    """What a module has, whatever its own state dict says."""
    return {name: tensor.detach().clone() for name, tensor in named_tensors(module, aliases=True).items()}


def alone(tmp_path, module, config=CONFIG):
    """What a new callback makes of a module."""
    return fit(tmp_path, module, LoraCallback(config))


def checkpoint(tmp_path, config=CONFIG):
    """The file of a run of its own."""
    run = trainer(tmp_path, [LoraCallback(config, merge_on_fit_end=False)], max_epochs=1)
    run.fit(Classifier(lr=0.2), loader())
    run.save_checkpoint(tmp_path / "it.ckpt")
    return tmp_path / "it.ckpt"


def plain_epoch(tmp_path, module):
    trainer(tmp_path, [], max_epochs=1).fit(module, loader())


class TestFolds:
    @CONFIGS
    def test_new_modules(self, tmp_path, config):
        callback = LoraCallback(config)
        first, second = (fit(tmp_path, Classifier(lr=0.3), callback) for _ in range(2))
        assert not differing(first, second)

    @thinned(2, config=KINDS, between=["nothing", "test", "test_best", "validate_best", "predict_best"])
    def test_one_module_that_is_reset(self, tmp_path, config, between):
        """Also after a checkpoint was tested: its adapter is not on the module when other weights are loaded."""
        callback, module = LoraCallback(config), Classifier(lr=0.3)
        start = values(module)
        path = checkpoint(tmp_path, config)
        results = []
        for _ in range(3):
            module.load_state_dict(start)
            results.append(fit(tmp_path, module, callback))
            stage, _, best = between.partition("_")
            if stage != "nothing":
                run = trainer(tmp_path, [callback])
                getattr(run, stage)(module, loader(), ckpt_path=path if best else None)
        assert not differing(results[0], results[1])
        assert not differing(results[0], results[2])

    @CONFIGS
    def test_one_trainer(self, tmp_path, config):
        torch.manual_seed(3)
        callback = LoraCallback(config)
        run = trainer(tmp_path, [callback], max_epochs=1)
        run.fit(first := Classifier(lr=0.3), loader())
        torch.manual_seed(3)
        run.fit_loop.max_epochs = 2
        run.fit(second := Classifier(lr=0.3), loader())
        assert not differing(values(first), values(second))


class TestWhatIsThereWins:
    def test_loaded_weights(self, tmp_path, caplog):
        callback, module, other = LoraCallback(CONFIG), Classifier(lr=0.3), Classifier(base_seed=5, lr=0.3)
        fit(tmp_path, module, callback)
        module.load_state_dict(values(other))
        with caplog.at_level(logging.INFO):
            found = fit(tmp_path, module, callback)
        assert "net.0.weight" in caplog.text
        assert "not taken back" in caplog.text
        assert not differing(found, alone(tmp_path, other))

    @pytest.mark.filterwarnings("ignore:1 weight of Classifier is one that an adapter was merged into:UserWarning")
    def test_one_loaded_weight_is_enough(self, tmp_path):
        callback, module = LoraCallback(CONFIG), Classifier(lr=0.3)
        fit(tmp_path, module, callback)
        with torch.no_grad():
            module.net[3].weight[0, 0] += 1
        expected = alone(tmp_path, copy.deepcopy(module))
        assert not differing(fit(tmp_path, module, callback), expected)

    def test_plain_fine_tuning_between(self, tmp_path):
        callback, module = LoraCallback(CONFIG), Classifier(lr=0.3)
        fit(tmp_path, module, callback)
        plain_epoch(tmp_path, module)
        expected = alone(tmp_path, copy.deepcopy(module))
        assert not differing(fit(tmp_path, module, callback), expected)

    def test_another_module_in_between(self, tmp_path):
        callback, module = LoraCallback(CONFIG), Classifier(lr=0.3)
        fit(tmp_path, module, callback)
        trainer(tmp_path, [callback]).test(Classifier(base_seed=5), loader(), verbose=False)
        callback.undo_merge(module)
        assert not differing(values(LoraModel(module).unload()), values(Classifier()))

    def test_run_that_learned_nothing_leaves_nothing_to_another_module(self, tmp_path):
        callback = LoraCallback(CONFIG)
        with pytest.warns(UserWarning, match="did not move"):
            fit(tmp_path, Classifier(lr=1e-30), callback, seed=1)
        assert not differing(fit(tmp_path, Classifier(lr=0.3), callback), alone(tmp_path, Classifier(lr=0.3)))


class KeepsOptimizer(Classifier):
    """Has one optimizer for all of its fits."""

    optimizer = None

    def configure_optimizers(self):
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)
        return self.optimizer


class TestTakenBack:
    @CONFIGS
    def test_an_optimizer_that_outlives_the_fit_goes_on(self, tmp_path, config):
        """Momentum goes on, and a file of the second fit fits an optimizer of a new module."""
        ends = []
        for merge in (True, False):
            callback, module = LoraCallback(config, merge_on_fit_end=merge), KeepsOptimizer()
            fit(tmp_path, module, callback)
            size = sum(len(group["params"]) for group in module.optimizer.param_groups)
            run = trainer(tmp_path, [callback, ModelCheckpoint(tmp_path, filename=f"{merge}")], max_epochs=1)
            run.fit(module, loader())
            assert sum(len(group["params"]) for group in module.optimizer.param_groups) == size
            resumed = KeepsOptimizer()
            trainer(tmp_path, [LoraCallback(config)], max_epochs=2).fit(
                resumed, loader(), ckpt_path=tmp_path / f"{merge}.ckpt"
            )
            ends.append(values(resumed))
        assert not differing(*ends)

    @pytest.mark.parametrize("between", ["nothing", "test", "file", "same_values", "to_float64_and_back", "copy"])
    def test_same_values_go_on(self, tmp_path, between):
        """A file of the merged module is read by tuners too, which put back what they have tried on."""
        callback, module = LoraCallback(CONFIG), Classifier(lr=0.3)
        fit(tmp_path, module, callback)
        if between == "test":
            trainer(tmp_path, [callback]).test(module, loader(), verbose=False)
        elif between == "file":
            run = trainer(tmp_path, [callback])
            run.strategy.connect(module)
            run.save_checkpoint(tmp_path / "merged.ckpt")
            run.test(module, loader(), ckpt_path=tmp_path / "merged.ckpt", verbose=False)
        elif between == "same_values":
            module.load_state_dict(values(module))
        elif between == "to_float64_and_back":
            module.double().float()
        elif between == "copy":
            module = copy.deepcopy(module)
        callback.undo_merge(module)
        assert LoraModel(module).active_adapters == ("default",)
        assert not differing(values(LoraModel(module).unload()), values(Classifier()))

    def test_test_with_a_checkpoint_leaves_its_adapter_merged(self, tmp_path):
        callback, module = LoraCallback(CONFIG), Classifier(lr=0.3)
        path = checkpoint(tmp_path)
        fit(tmp_path, module, callback)
        trainer(tmp_path, [callback]).test(module, loader(), ckpt_path=path, verbose=False)
        expected = load_from_checkpoint(Classifier, path)
        LoraModel(expected).merge_and_unload()
        assert not differing(values(module), values(expected))
        assert [type(child) for child in module.modules()] == [type(child) for child in Classifier().modules()]


def test_random_numbers_of_a_tested_file_are_not_those_of_the_next_fit(tmp_path):
    run = trainer(tmp_path, [LoraCallback(CONFIG)], max_epochs=1)
    run.test(Classifier(), loader(), ckpt_path=checkpoint(tmp_path), verbose=False)
    torch.manual_seed(11)
    run.fit(first := Classifier(dropout=0.5), loader(shuffle=True))
    torch.manual_seed(11)
    trainer(tmp_path, [LoraCallback(CONFIG)], max_epochs=1).fit(second := Classifier(dropout=0.5), loader(shuffle=True))
    assert not differing(values(first), values(second))


class TestTwoAdapters:
    """Two callbacks with one target: each has its adapter and its files, and they are merged together."""

    SECOND = LoraConfig(r=3, target_modules=["net.3"])

    def callbacks(self, tmp_path, **options):
        return [
            LoraCallback(CONFIG, adapter_name="a", save_adapter_to=str(tmp_path / "a"), **options),
            LoraCallback(self.SECOND, adapter_name="b", save_adapter_to=str(tmp_path / "b"), **options),
        ]

    @pytest.mark.parametrize("merge", [True, False], ids=["merged", "adapted"])
    @pytest.mark.parametrize("fits", [1, 2])
    def test_fit(self, tmp_path, merge, fits):
        module, callbacks = Classifier(lr=0.3), self.callbacks(tmp_path, merge_on_fit_end=merge)
        for _ in range(fits):
            trainer(tmp_path, callbacks, max_epochs=1).fit(module, loader())
        if not merge:
            LoraModel(module).merge_and_unload()
        again = Classifier()
        lora = LoraModel.load_adapter(again, tmp_path / "a")
        LoraModel.load_adapter(again, tmp_path / "b")
        lora.set_adapter(["a", "b"])
        lora.merge_and_unload()
        assert values(module).keys() == values(Classifier()).keys()
        assert not differing(values(module), values(again))

    def test_best_and_export_and_a_checkpoint_after_it(self, tmp_path, capsys):
        saver = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
        callbacks = self.callbacks(tmp_path, merge_source="best", export_to=str(tmp_path / "merged.safetensors"))
        run = trainer(tmp_path, [*callbacks, saver], max_epochs=2)
        run.fit(module := Classifier(lr=0.3), loader(), loader())
        assert capsys.readouterr().out.count("module = load_from_checkpoint(") == 1
        exported = safetensors.torch.load_file(tmp_path / "merged.safetensors")
        assert not differing(values(module), exported)
        for path, logged in saver.best_k_models.items():
            found = run.validate(module, loader(), ckpt_path=path, verbose=False)[0]["val/loss"]
            assert found == pytest.approx(float(logged), rel=1e-6)
        assert values(module).keys() == values(Classifier()).keys()

    @pytest.mark.parametrize(
        ("option", "given", "told"),
        [
            ("merge_on_fit_end", (True, False), "True of 'a', False of 'b'"),
            ("max_error", (0.5, 0.1), r"0\.5 of 'a', 0\.1 of 'b'"),
            ("train_mode", (False, True), "False of 'a', True of 'b'"),
        ],
    )
    def test_options_that_contradict_each_other_are_refused(self, tmp_path, option, given, told):
        callbacks = self.callbacks(tmp_path)
        for callback, value in zip(callbacks, given, strict=True):
            setattr(callback, option, value)
        with pytest.raises(ConfigError, match=f"with one target .* {option} differs: {told}"):
            trainer(tmp_path, callbacks).fit(Classifier(), loader())

    def test_max_error_of_no_merge_is_that_of_each(self, tmp_path):
        callbacks = self.callbacks(tmp_path, merge_on_fit_end=False)
        callbacks[0].max_error = 0.5
        trainer(tmp_path, callbacks).fit(Classifier(), loader())


class TestAnAdapterOfNoCallback:
    """It is active from an earlier fit or by hand, so it is trained and merged, and in no file of the adapter."""

    @pytest.mark.parametrize("there", [True, False], ids=["reused", "added"])
    def test_is_named(self, tmp_path, there):
        module = Classifier(lr=0.3)
        LoraModel(module, CONFIG, "a")
        if there:
            LoraModel(module).add_adapter("b", CONFIG)
        run = trainer(tmp_path, [LoraCallback(CONFIG, adapter_name="b")], max_epochs=1)
        with pytest.warns(UserWarning, match=r"No LoraCallback of this fit .* 1 active adapter of Classifier: 'a'\."):
            run.fit(module, loader())

    def test_is_not_where_it_does_not_act(self, tmp_path):
        module = Classifier(lr=0.3)
        LoraModel(module, CONFIG, "b")
        LoraModel(module).add_adapter("a", CONFIG)
        trainer(tmp_path, [LoraCallback(CONFIG, adapter_name="b")], max_epochs=1).fit(module, loader())


class Tied(Classifier):
    """Has one weight in two layers."""

    def __init__(self, **options):
        super().__init__(**options)
        self.twin = nn.Linear(16, 3, bias=False)
        self.twin.weight = self.net[3].weight


class Rebuilt(Classifier):
    """Its hook leaves it to the checkpoint what values the network has, as that of kraken's recognizer does."""

    def on_load_checkpoint(self, checkpoint):
        self.net = Classifier(base_seed=9).net


class SavesItsHead(Classifier):
    """Its hook leaves the backbone out of the file."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {key: value for key, value in state.items() if key.startswith("net.3.")}


class NamesItsParameters(Classifier):
    """Lists its parameters by names of its own."""

    def named_parameters(self, *args, **kwargs):
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield f"its.{name}", parameter


class Normed(Classifier):
    """Has layers with weight norm."""

    def __init__(self, hooks: bool, **arguments):
        super().__init__(**arguments)
        for layer in (self.net[0], self.net[3]):
            (nn.utils.weight_norm if hooks else nn.utils.parametrizations.weight_norm)(layer)


class Teacher(Classifier):
    """Moves a frozen copy, which starts with the values of its original or with others."""

    def __init__(self, apart: float = 0.0, **arguments):
        super().__init__(**arguments)
        self.copy = copy.deepcopy(self.net).requires_grad_(False)
        for parameter in self.copy.parameters():
            parameter.mul_(1 + apart)  # frozen, so in place

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for own, its in zip(self.copy.parameters(), self.net.parameters(), strict=True):
                own.lerp_(its, 0.1)


class TestNewCallbackOnMergedWeights:
    """A cell of a notebook that is run twice."""

    def again(self, tmp_path, module, *more, epochs=1, **options):
        run = trainer(tmp_path, [LoraCallback(CONFIG, **options), *more], max_epochs=epochs)
        run.fit(module, loader(), loader())
        return run

    def merged(self, tmp_path, lr=0.3):
        fit(tmp_path, module := Classifier(lr=lr), LoraCallback(CONFIG))
        return module

    @pytest.mark.parametrize("copied", [False, True])
    def test_is_said(self, tmp_path, copied):
        module = self.merged(tmp_path)
        with pytest.warns(UserWarning, match=r"2 weights of Classifier.*merged.*net\.0\.weight.*same LoraCallback"):
            self.again(tmp_path, copy.deepcopy(module) if copied else module)

    @pytest.mark.parametrize(
        ("fields", "options"),
        [
            ({}, {"save_adapter_to": "a"}),
            ({"init": "pissa"}, {}),
            ({"quantize": "int8", "quantize_options": {"min_size": 0}}, {"dequantize": True}),
        ],
        ids=["folder", "init", "stored"],
    )
    def test_what_could_not_be_loaded_is_refused_before_anything(self, tmp_path, fields, options):
        module = self.merged(tmp_path)
        before = values(module)
        config = dataclasses.replace(CONFIG, **fields)
        with pytest.raises(StateError, match=r"merged into.*could not be loaded again.*export_to"):
            trainer(tmp_path, [LoraCallback(config, **options)]).fit(module, loader())
        assert not differing(before, values(module))

    @pytest.mark.filterwarnings("ignore:2 weights of Classifier are those that an adapter was merged into:UserWarning")
    @pytest.mark.parametrize("lr", [0.3, 1e-4], ids=["far", "near"])
    def test_its_checkpoints_hold_the_base(self, tmp_path, lr):
        """Also where the first update is so small that a fingerprint does not tell the two bases apart."""
        module = self.merged(tmp_path, lr)
        saver = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        torch.manual_seed(5)
        self.again(tmp_path, module, saver, epochs=2, merge_on_fit_end=False)
        path = tmp_path / "epoch=0.ckpt"
        loaded = load_from_checkpoint(Classifier, tmp_path / "epoch=1.ckpt")
        assert not differing(values(loaded), values(module))
        resumed = Classifier(lr=lr)
        run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], max_epochs=2)
        run.fit(resumed, loader(), loader(), ckpt_path=path)
        assert not differing(values(resumed), values(module))
        run.save_checkpoint(tmp_path / "resumed.ckpt")
        loaded = load_from_checkpoint(Classifier, tmp_path / "resumed.ckpt")
        assert not differing(values(loaded), values(module))
        tested = trainer(tmp_path, [LoraCallback(CONFIG)]).test(
            Classifier(), loader(), ckpt_path=tmp_path / "epoch=1.ckpt", verbose=False
        )
        assert tested == trainer(tmp_path, []).test(module, loader(), verbose=False)

    @pytest.mark.filterwarnings("ignore:.*are those that an adapter was merged into:UserWarning")
    @pytest.mark.parametrize(
        ("kind", "fields"),
        [
            pytest.param(Classifier, {"bias": "all"}, id="biases"),
            pytest.param(Classifier, {"target_modules": ["net.0"], "modules_to_save": ["net.3"]}, id="head"),
            pytest.param(Classifier, {"modules_to_save": ["net.1"]}, id="norm"),
            pytest.param(Classifier, {"norm": "track"}, id="statistics"),
            pytest.param(Tied, {"target_modules": ["net.0", "net.3", "twin"]}, id="a tied weight"),
        ],
    )
    @pytest.mark.parametrize("again", [False, True], ids=["not again", "again"])
    def test_its_checkpoints_hold_what_the_first_adapter_has_changed(self, tmp_path, kind, fields, again):
        first = dataclasses.replace(CONFIG, **fields)
        second = first if again else dataclasses.replace(CONFIG, target_modules=first.target_modules)
        fit(tmp_path, module := kind(), LoraCallback(first))
        other = copy.deepcopy(module)
        run = trainer(tmp_path, [LoraCallback(second, merge_on_fit_end=False)], max_epochs=1)
        run.fit(module, loader())
        run.save_checkpoint(path := tmp_path / "second.ckpt")
        for loaded in (load_from_checkpoint(kind, path), other):
            run = trainer(tmp_path, [LoraCallback(second, merge_on_fit_end=False)])
            run.test(loaded, loader(), ckpt_path=path, verbose=False)
            assert not differing(values(loaded), values(module))
        with pytest.raises(AdapterFileError, match="another base"):
            load_from_checkpoint(kind, path, base_seed=1)

    @pytest.mark.filterwarnings("ignore:2 weights of Classifier are those that an adapter was merged into:UserWarning")
    @pytest.mark.parametrize("merges", [1, 2])
    def test_its_checkpoints_are_refused_on_another_base(self, tmp_path, merges):
        """Those that hold merged weights leave the rest of the base out: norms, biases and layers without adapters."""
        module = self.merged(tmp_path)
        for _ in range(1, merges):
            self.again(tmp_path, module)
        run = self.again(tmp_path, module, merge_on_fit_end=False)
        run.save_checkpoint(path := tmp_path / "second.ckpt")
        assert not differing(values(load_from_checkpoint(Classifier, path)), values(module))
        with pytest.raises(AdapterFileError, match=r"another base: 'net\.0\.weight'.*2 of 2.*pretrained weights first"):
            load_from_checkpoint(Classifier, path, base_seed=1)
        with pytest.raises(AdapterFileError, match=r"Classifier has no 'net\.0\.weight' of shape \[16, 4\]"):
            load_from_checkpoint(Classifier, path, width=8)
        before = values(other := Classifier(base_seed=1))
        with pytest.raises(AdapterFileError, match="another base"):
            trainer(tmp_path, [LoraCallback(CONFIG)]).test(other, loader(), ckpt_path=path)
        assert not differing(before, values(other))

    @pytest.mark.filterwarnings("ignore:[24] weights of .* are those that an adapter was merged into:UserWarning")
    @pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
    @pytest.mark.parametrize("hooks", [False, True], ids=["parametrizations", "hooks"])
    def test_its_checkpoints_of_normed_weights_are_refused_on_another_base(self, tmp_path, hooks):
        fit(tmp_path, module := Normed(hooks), LoraCallback(CONFIG))
        run = self.again(tmp_path, module, merge_on_fit_end=False)
        run.save_checkpoint(path := tmp_path / "second.ckpt")
        loaded = load_from_checkpoint(Normed, path)
        assert not differing(own_values(loaded), own_values(module))
        with pytest.raises(AdapterFileError, match=r"another base: 'net\.0\..*4 of 4"):
            load_from_checkpoint(Normed, path, base_seed=1)

    @pytest.mark.filterwarnings("ignore:2 weights of Classifier are those that an adapter was merged into:UserWarning")
    @thinned(
        2,
        precision=["bf16-true", "64-true"],
        by_hand=[[], ["dtype"], [torch.bfloat16, "dtype"], [torch.float64, "dtype"]],
    )
    def test_its_checkpoints_hold_weights_that_were_cast(self, tmp_path, precision, by_hand):
        dtype = {"bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
        module = self.merged(tmp_path)
        for each in by_hand:
            module.to(dtype if each == "dtype" else each)
        run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)], max_epochs=1, precision=precision)
        run.fit(module, loader())
        run.save_checkpoint(path := tmp_path / "second.ckpt")
        loaded = load_from_checkpoint(Classifier, path).to(dtype)
        found, expected = values(loaded), values(module)
        cast = [key for key in expected if not key.endswith("bias")]  # which no file holds, so none is rounded
        torch.testing.assert_close([found[k] for k in cast], [expected[k] for k in cast], rtol=1e-6, atol=1e-7)

    @pytest.mark.filterwarnings("ignore:2 weights of Classifier are those that an adapter was merged into:UserWarning")
    def test_its_checkpoints_fit_a_module_that_has_the_merged_weights(self, tmp_path):
        module = self.merged(tmp_path)
        exported = values(module)
        self.again(tmp_path, module, merge_on_fit_end=False).save_checkpoint(path := tmp_path / "second.ckpt")
        (loaded := Classifier(base_seed=1)).load_state_dict(exported)
        run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)])
        run.test(loaded, loader(), ckpt_path=path, verbose=False)
        assert not differing(values(loaded), values(module))

    @pytest.mark.filterwarnings("ignore:2 weights of Rebuilt are those that an adapter was merged into:UserWarning")
    def test_its_checkpoints_fit_a_module_whose_hook_builds_the_network_anew(self, tmp_path):
        fit(tmp_path, module := Rebuilt(), LoraCallback(CONFIG))
        self.again(tmp_path, module, merge_on_fit_end=False).save_checkpoint(path := tmp_path / "second.ckpt")
        assert not differing(values(load_from_checkpoint(Rebuilt, path)), values(module))
        run = trainer(tmp_path, [LoraCallback(CONFIG, merge_on_fit_end=False)])
        run.test(tested := Rebuilt(), loader(), ckpt_path=path, verbose=False)
        assert not differing(values(tested), values(module))
        with pytest.raises(AdapterFileError, match="another base"):
            load_from_checkpoint(Rebuilt, path, base_seed=1)

    @pytest.mark.filterwarnings("ignore:[23] weights of .* are those that an adapter was merged into:UserWarning")
    @pytest.mark.filterwarnings("ignore:Found keys that are in the model state dict but not in the:UserWarning")
    @pytest.mark.parametrize("cls", [SavesItsHead, HidesItsBackbone, Renames, Tied, NamesItsParameters])
    def test_its_checkpoints_hold_the_base_under_any_name(self, tmp_path, cls):
        """Where the module's own hooks take merged weights out of the state dict, or two layers have one weight."""
        config = LoraConfig(r=2)
        fit(tmp_path, module := cls(lr=0.3), LoraCallback(config))
        run = trainer(tmp_path, [LoraCallback(config, merge_on_fit_end=False)], max_epochs=1)
        run.fit(module, loader())
        run.save_checkpoint(path := tmp_path / "second.ckpt")
        run = trainer(tmp_path, [LoraCallback(config, merge_on_fit_end=False)])
        run.test(tested := cls(), loader(), ckpt_path=path, verbose=False)
        for read in (tested, load_from_checkpoint(cls, path)):
            assert not differing(own_values(read), own_values(module))
        with pytest.raises(AdapterFileError, match="another base"):
            load_from_checkpoint(cls, path, base_seed=1)

    @pytest.mark.filterwarnings("ignore:[0-9] weights of Teacher are those that an adapter was merged:UserWarning")
    @pytest.mark.parametrize("apart", [0.0, 0.1], ids=["equal", "with weights of its own"])
    def test_its_checkpoints_hold_a_copy_that_the_module_moves(self, tmp_path, apart):
        config = LoraConfig(r=2)
        module = Teacher(apart=apart, lr=0.3)
        for fits in range(3):
            saver = ModelCheckpoint(tmp_path, filename=f"{fits}-{{epoch}}", save_top_k=-1)
            torch.manual_seed(fits)
            run = trainer(tmp_path, [LoraCallback(config), saver], max_epochs=2)
            run.fit(module, loader())
            loaded = load_from_checkpoint(Teacher, tmp_path / f"{fits}-epoch=1.ckpt")
            LoraModel(loaded).merge_and_unload()
            assert not differing(values(loaded), values(module))
            resumed = Teacher(apart=apart, lr=0.3)
            again = trainer(tmp_path, [LoraCallback(config)], max_epochs=2)
            again.fit(resumed, loader(), ckpt_path=tmp_path / f"{fits}-epoch=0.ckpt")
            assert not differing(values(resumed), values(module))
            with pytest.raises(AdapterFileError, match="another base"):
                load_from_checkpoint(Teacher, tmp_path / f"{fits}-epoch=1.ckpt", base_seed=1)

    @pytest.mark.filterwarnings("ignore:2 weights of Classifier are those that an adapter was merged into:UserWarning")
    def test_its_merge_is_taken_back_onto_the_first_one(self, tmp_path):
        module = self.merged(tmp_path)
        first = values(module)
        callback = LoraCallback(CONFIG)
        fit(tmp_path, module, callback, seed=4)
        callback.undo_merge(module)
        assert not differing(values(LoraModel(module).unload()), first)
        with pytest.warns(UserWarning, match="was merged into"):
            self.again(tmp_path, module)

    @pytest.mark.parametrize("lr", [0.3, 1e-4], ids=["far", "near"])
    def test_checkpoint_of_the_first_adapter_is_of_another_base(self, tmp_path, lr):
        saver = ModelCheckpoint(tmp_path, filename="first")
        trainer(tmp_path, [LoraCallback(CONFIG), saver], max_epochs=1).fit(module := Classifier(lr=lr), loader())
        before = values(module)
        run = trainer(tmp_path, [LoraCallback(CONFIG)])
        with pytest.raises(AdapterFileError, match="another base"):
            run.test(module, loader(), ckpt_path=tmp_path / "first.ckpt")
        assert not differing(before, values(module))

    def test_loaded_or_trained_weights_are_a_base_like_any_other(self, tmp_path):
        module = self.merged(tmp_path)
        plain_epoch(tmp_path, module)
        self.again(tmp_path, module, save_adapter_to=str(tmp_path / "a"))
        module.load_state_dict(values(Classifier()))
        self.again(tmp_path, module, save_adapter_to=str(tmp_path / "a"))
        again = Classifier()
        LoraModel.load_adapter(again, tmp_path / "a").merge_and_unload()
        assert not differing(values(again), values(module))


class Masked(Classifier):
    """Keeps a mask for the next batch of the same size."""

    def __init__(self, lr: float = 0.3) -> None:
        super().__init__(lr=lr)
        self.register_buffer("mask", None, persistent=False)

    def forward(self, x):
        if self.mask is None:
            self.mask = torch.ones(x.shape[1])
        return self.net(x * self.mask)


@pytest.mark.parametrize("stage", ["validate", "predict"])
def test_fit_after_a_run_in_inference_mode(tmp_path, stage):
    expected = fit(tmp_path, Masked(), LoraCallback(CONFIG))
    module, callback = Masked(), LoraCallback(CONFIG)
    getattr(trainer(tmp_path, [callback]), stage)(module, loader())
    assert not differing(fit(tmp_path, module, callback), expected)


@CONFIGS
def test_parameters_that_are_swapped_when_a_module_is_moved(tmp_path, config, request):
    """As every fit moves its module to the CPU at its end, and a user the fitted one where it is needed."""
    expected, _ = fitted_and_moved(tmp_path / "expected", config)
    request.getfixturevalue("swapped_by_conversions")
    found, module = fitted_and_moved(tmp_path / "found", config)
    assert not differing(found, expected)
    module.double().float()


def fitted_and_moved(tmp_path, config):
    """What two fits of a module leave that is moved between them."""
    module, callback = Classifier(lr=0.3), LoraCallback(config)
    fit(tmp_path, module, callback)
    module.double().float()
    return fit(tmp_path, module, callback), module
