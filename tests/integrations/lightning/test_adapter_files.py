"""The adapter of a run in several formats, from Python and from YAML."""

import copy
import json
import re
from collections import UserList
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lora_plugins import AdapterFileError, ConfigError, LoraConfig, LoraModel, MergeError, PluginError
from lora_plugins.cli.main import main
from lora_plugins.files import OWN_ENTRIES
from lora_plugins.integrations.lightning import AdapterFile, LoraCallback
from lora_plugins.integrations.lightning.adapter_files import adapter_files, check_room
from lora_plugins.testing.full_disk import no_file_beyond
from tests.integrations.lightning.toys import CONFIG, Classifier, FillsItsBackboneIn, loader, lora, trainer

X = torch.linspace(-1, 1, 20).view(5, 4)


def fitted(tmp_path, files, module=None, **options):
    module = Classifier() if module is None else module
    callback = lora(target="net", config=replace(CONFIG, target_modules=["0", "3"]), save_adapter_to=files, **options)
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader())
    return module


def loaded(path):
    net = Classifier().net.eval()
    LoraModel.load_adapter(net, path)
    return net(X)


@pytest.mark.parametrize("merge", [False, True])
def test_every_file_is_the_adapter_that_was_trained(tmp_path, merge, capsys):
    files = [
        str(tmp_path / "ours"),
        AdapterFile(str(tmp_path / "theirs"), "peft"),
        AdapterFile(str(tmp_path / "web.safetensors"), "kohya", {"component": "unet"}),
    ]
    module = fitted(tmp_path, files, merge_on_fit_end=merge)
    expected = module.net.eval()(X)
    for name in ("ours", "theirs", "web.safetensors"):
        torch.testing.assert_close(loaded(tmp_path / name), expected, rtol=0, atol=1e-6)  # float32, merged or not
    out = capsys.readouterr().out
    assert f"Adapter: {tmp_path / 'ours'}" in out
    assert f"Adapter for peft: {tmp_path / 'theirs'}" in out


def test_files_of_one_format_are_all_told(tmp_path, capsys):
    """As those of the two transformers of Wan 2.2, of which no file of diffusers holds both."""
    ours = [str(tmp_path / "a"), str(tmp_path / "b")]
    fitted(tmp_path, [*ours, *(AdapterFile(str(tmp_path / name), "peft") for name in ("c", "d"))])
    out = capsys.readouterr().out
    told = {"Adapter": "a", "Adapter 2": "b", "Adapter for peft": "c", "Adapter for peft 2": "d"}
    assert [title for title, name in told.items() if f"{title}: {tmp_path / name}" not in out] == []


def test_a_full_disk_at_the_merged_model_says_that_the_adapter_is_saved(tmp_path):
    wide, merged = Classifier(width=4000), tmp_path / "merged.safetensors"
    with no_file_beyond(100_000), pytest.raises(OSError, match="File too large") as raised:
        fitted(tmp_path, tmp_path / "adapter", wide, export_to=merged)
    assert raised.value.__notes__ == [f"The adapter is saved: {str(tmp_path / 'adapter')!r}."]
    assert raised.value.filename == str(merged)
    assert not merged.exists()
    LoraModel.load_adapter(Classifier(width=4000).net, tmp_path / "adapter")


class Counting(nn.Identity):
    """What a layer counts itself in training changes what it computes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += self.training
        return x + self.seen


class Codebook(nn.Identity):
    """Keeps a parameter that its author froze and moves by hand, as EMAVQ of taming-transformers does."""

    def __init__(self):
        super().__init__()
        self.seen = nn.Parameter(torch.zeros(16), requires_grad=False)

    def forward(self, x):
        if self.training:
            self.seen.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x + self.seen


@pytest.mark.parametrize("moving", [Counting, Codebook])
def test_what_training_moves_of_the_base_is_named(tmp_path, moving):
    module = Classifier()
    module.net[1] = moving()
    with pytest.warns(UserWarning, match=r"'net\.1\.seen' have changed .* the files of the adapter do not have"):
        fitted(tmp_path, str(tmp_path / "ours"), module)


@pytest.mark.parametrize("moving", [Counting, Codebook])
def test_what_a_resumed_run_moves_of_the_base_is_named(tmp_path, moving):
    modules = [Classifier(), Classifier()]
    for module in modules:
        module.net[1] = moving()
    first = trainer(tmp_path, [lora(CONFIG)], max_epochs=1)
    first.fit(modules[0], loader())
    first.save_checkpoint(path := tmp_path / "first.ckpt")
    again = trainer(tmp_path, [lora(CONFIG, save_adapter_to=tmp_path / "ours")], max_epochs=2)
    with pytest.warns(UserWarning, match=r"'net\.1\.seen' have changed .* the files of the adapter do not have"):
        again.fit(modules[1], loader(), ckpt_path=path)


class Prior(Classifier):
    """Writes into a frozen bias in one of its hooks, as detectors set the prior of their classes."""

    def __init__(self, hook):
        super().__init__()
        setattr(self, hook, self.write)

    def write(self, *_):
        with torch.no_grad():
            self.net[3].bias.add_(1)


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_end"])
def test_weights_that_a_hook_writes_beside_the_training_are_named(tmp_path, hook):
    callback = lora(LoraConfig(r=2, target_modules=["net.0"]), save_adapter_to=tmp_path / "ours")
    with pytest.warns(UserWarning, match=r"'net\.3\.bias' have changed .* the files of the adapter do not have"):
        trainer(tmp_path, [callback], max_epochs=2).fit(Prior(hook), loader())


class CountingPrior(Prior):
    """Has a layer as well that counts in training."""

    def __init__(self):
        super().__init__("on_fit_start")
        self.net[1] = Counting()


class TestMovedBeforeACheckpoint:
    """What moves is named where a checkpoint was loaded since, in which it is."""

    MOVED = r"'net\.1\.seen', 'net\.3\.bias' have changed .* the files of the adapter do not have"
    CONFIG = LoraConfig(r=2, target_modules=["net.0"])

    def test_the_best(self, tmp_path):
        files = [AdapterFile(str(tmp_path / "ours")), AdapterFile(str(tmp_path / "theirs"), "peft")]
        best = ModelCheckpoint(tmp_path, monitor="train/loss")
        callback = lora(self.CONFIG, save_adapter_to=files, merge_source="best")
        ours = pytest.warns(UserWarning, match=self.MOVED)
        theirs = pytest.warns(UserWarning, match=r"does not hold 'net\.3\.bias', 'net\.1\.seen', which have changed")
        with ours, theirs:
            trainer(tmp_path, [callback, best]).fit(CountingPrior(), loader())

    @pytest.mark.parametrize("same", [True, False], ids=["same module", "new module"])
    def test_that_of_a_resumed_run(self, tmp_path, same):
        module = CountingPrior()
        kept = ModelCheckpoint(tmp_path, save_last=True)
        trainer(tmp_path, [lora(self.CONFIG), kept], max_epochs=1).fit(module, loader())
        callback = lora(self.CONFIG, save_adapter_to=tmp_path / "ours")
        with pytest.warns(UserWarning, match=self.MOVED):
            trainer(tmp_path, [callback]).fit(
                module if same else CountingPrior(), loader(), ckpt_path=tmp_path / "last.ckpt"
            )


class TestFilledIn:
    """What the module's own hook fills into a checkpoint, from what it has, was not moved: warnings are errors here."""

    def test_the_best(self, tmp_path):
        callback = lora(save_adapter_to=tmp_path / "ours", merge_source="best")
        best = ModelCheckpoint(tmp_path, monitor="train/loss")
        trainer(tmp_path, [callback, best]).fit(FillsItsBackboneIn(), loader())

    def test_that_of_a_resumed_run(self, tmp_path):
        kept = ModelCheckpoint(tmp_path, save_last=True)
        trainer(tmp_path, [lora(), kept], max_epochs=1).fit(FillsItsBackboneIn(), loader())
        callback = lora(save_adapter_to=tmp_path / "ours")
        trainer(tmp_path, [callback]).fit(FillsItsBackboneIn(), loader(), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize("listed", [False, True])
def test_places_are_paths_or_texts(tmp_path, listed):
    ours = tmp_path / "ours"
    module = fitted(tmp_path, [ours] if listed else ours, export_to=tmp_path / "merged.safetensors")
    expected = module.net.eval()(X)
    torch.testing.assert_close(loaded(ours), expected, rtol=0, atol=1e-6)  # float32, merged or not
    plain = Classifier().net.eval()
    plain.load_state_dict(load_file(tmp_path / "merged.safetensors"))
    torch.testing.assert_close(plain(X), expected, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [str, Path, AdapterFile], ids=lambda kind: kind.__name__)
def test_places_below_the_home_are_there(tmp_path, monkeypatch, kind):
    """Lightning reads `~` so in its own places, and the rest of a run would lie in a folder of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    fitted(tmp_path, kind("~/ours"), export_to="~/merged.safetensors")
    assert not (tmp_path / "~").exists()
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"ours", "merged.safetensors"}


def test_what_a_format_cannot_express_is_told_before_training(tmp_path):
    class Grouped(Classifier):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Unflatten(1, (4, 1)), nn.Conv1d(4, 4, 1, groups=2), nn.Flatten(), nn.Linear(4, 3)
            )

        def training_step(self, batch, batch_idx):
            raise AssertionError("it was trained")

    callback = LoraCallback(
        LoraConfig(r=2, target_modules=["1", "3"]),
        target="net",
        save_adapter_to=[AdapterFile(str(tmp_path / "theirs"), "peft")],
        print_plan=False,
    )
    with pytest.raises(AdapterFileError, match="'1': a convolution of 2 groups has no form there"):
        trainer(tmp_path, [callback], max_epochs=1, num_sanity_val_steps=0).fit(Grouped(), loader())
    assert not (tmp_path / "theirs").exists()


def test_an_unknown_format_is_told_before_training(tmp_path):
    with pytest.raises(PluginError, match="There is no format 'pefd'"):
        fitted(tmp_path, [AdapterFile(str(tmp_path / "theirs"), "pefd")])


@pytest.mark.parametrize(
    ("files", "match"),
    [
        pytest.param(["a", "a"], r"Two results of a run would be written to \S+/a\.", id="twice"),
        pytest.param([Path("a"), AdapterFile("./b/../a/", "peft")], "Two results", id="twice, in other words"),
        pytest.param(3, r"holds 3\. An entry is a path, or an AdapterFile", id="a number alone"),
        pytest.param([AdapterFile(3)], r"holds AdapterFile\(path=3, .*An entry is a path", id="a number in a file"),
        pytest.param(
            [AdapterFile("web.safetensors", format_options={"component": "unet"})],
            r"format_options of web.safetensors are {'component': 'unet'}, and our own folder has none. Say which",
            id="options of no format",
        ),
        pytest.param([3], r"holds 3\. An entry is a path, or an AdapterFile", id="a number"),
    ],
)
def test_what_names_no_files_is_refused(files, match):
    with pytest.raises(ConfigError, match=match):
        LoraCallback(CONFIG, save_adapter_to=files)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"save_adapter_to": "a"}, {"save_adapter_to": "a"}, id="adapters"),
        pytest.param({"export_to": "a.safetensors"}, {"export_to": "a.safetensors"}, id="merged models"),
        pytest.param(
            {"export_to": "a.safetensors"},
            {"save_adapter_to": [AdapterFile("a.safetensors", "kohya", {"component": "unet"})]},
            id="a merged model and an adapter",
        ),
    ],
)
def test_results_that_would_overwrite_each_other_are_refused_before_training(first, second, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callbacks = [
        LoraCallback(LoraConfig(r=2, target_modules="all"), target=target, **given)
        for target, given in (("net.0", first), ("net.3", second))
    ]
    with pytest.raises(ConfigError, match="Two results of a run would be written to"):
        trainer(tmp_path, callbacks, max_epochs=1).fit(Classifier(), loader())


def test_callbacks_of_one_target_may_name_one_merged_model(tmp_path):
    merged = str(tmp_path / "merged.safetensors")
    callbacks = [
        lora(target="net", config=replace(CONFIG, target_modules=[layer]), adapter_name=name, export_to=merged)
        for name, layer in (("a", "0"), ("b", "3"))
    ]
    module = Classifier()
    trainer(tmp_path, callbacks, max_epochs=1).fit(module, loader())
    plain = Classifier().net.eval()
    plain.load_state_dict(load_file(merged))
    torch.testing.assert_close(plain(X), module.net.eval()(X), rtol=0, atol=0)


def test_a_compiled_network_writes_plain_names(tmp_path):
    module = Classifier()
    plain = copy.deepcopy(module.net).eval()
    module.net = torch.compile(module.net, backend="eager")
    callback = lora(config=CONFIG, save_adapter_to=[AdapterFile(str(tmp_path / "theirs"), "peft")])
    callback.config = replace(CONFIG, target_modules=["0", "3"], modules_to_save=["1"])
    trainer(tmp_path, [callback], max_epochs=1).fit(module, loader())
    holder = nn.ModuleDict({"net": plain})
    LoraModel.load_adapter(holder, tmp_path / "theirs")
    torch.testing.assert_close(plain(X), module.net.eval()(X), rtol=0, atol=1e-6)  # float32
    LoraModel.load_adapter(
        nn.ModuleDict({"net": torch.compile(Classifier().net, backend="eager")}), tmp_path / "theirs"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_from_yaml(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.yaml").write_text(
        """
model: {class_path: tests.integrations.lightning.toys.Classifier}
data: {class_path: tests.integrations.lightning.toys.Data}
lora: {r: 2, target_modules: [net.0, net.3]}
lora_callback:
  save_adapter_to:
    - ours
    - {path: theirs, format: peft}
trainer: {max_epochs: 1, accelerator: cpu, logger: false, enable_checkpointing: false}
"""
    )
    assert main(["fit", "--config", "file.yaml"]) == 0, capsys.readouterr().err
    assert (tmp_path / "ours" / "adapter.json").is_file()
    assert (tmp_path / "theirs" / "adapter_config.json").is_file()


class TestRoom:
    """With 80 TB to train and 400 TB in all: no disk has room for either."""

    def plan(self, **counts):
        return replace(LoraModel.plan(nn.Linear(4, 4), LoraConfig(r=2, target_modules="all")), **counts)

    @pytest.mark.parametrize(
        ("files", "export", "setting", "size"),
        [
            (["adapter"], None, "save_adapter_to", "76,293,945.3"),
            ([AdapterFile("peft", "peft")], "merged.safetensors", "save_adapter_to", "76,293,945.3"),
            ([], "deep/down/merged.safetensors", "export_to", "381,469,726.6"),
        ],
        ids=["an adapter", "in another format", "a merged file in a folder that is not there"],
    )
    def test_less_than_it_takes_is_told_before_training(self, tmp_path, monkeypatch, files, export, setting, size):
        monkeypatch.chdir(tmp_path)
        plan = self.plan(trained_parameters=2 * 10**13, base_parameters=10**14)
        with pytest.raises(ConfigError, match=f"{setting} is .*, which takes {size} MiB, and that disk has"):
            check_room(adapter_files(files), export, plan)
        assert not any(tmp_path.iterdir())

    def test_an_adapter_needs_no_room_for_its_base(self, tmp_path):
        check_room(adapter_files(str(tmp_path / "adapter")), None, self.plan(base_parameters=10**14))

    def test_enough_is_enough(self, tmp_path):
        check_room(adapter_files(str(tmp_path / "adapter")), str(tmp_path / "merged.safetensors"), self.plan())


@pytest.mark.parametrize("several", [list, tuple, UserList], ids=lambda several: several.__name__)
def test_several_files_come_in_a_list_of_any_class(several):
    """As those of a library of configurations, which has a class of its own."""
    files = adapter_files(several(["ours", AdapterFile("other", "peft")]))
    assert [(file.path, file.format) for file in files] == [("ours", "lora_plugins"), ("other", "peft")]


class Described(Classifier):
    """Says what its classes are called."""

    def file_entries(self, target):
        return {"classes": {"names": ["a", "b", "c"], "of": target}}


class TestWhatAModuleSays:
    @pytest.mark.parametrize("target", [None, "net"])
    def test_is_in_the_adapter_and_in_the_merged_file(self, tmp_path, target):
        names = ["net.0"] if target is None else ["0"]
        callback = LoraCallback(
            LoraConfig(r=2, target_modules=names),
            target=target,
            save_adapter_to=[tmp_path / "ours", AdapterFile(str(tmp_path / "theirs"), "peft")],
            export_to=tmp_path / "merged.safetensors",
            print_plan=False,
        )
        trainer(tmp_path, [callback]).fit(Described(), loader())
        said = {"names": ["a", "b", "c"], "of": target or ""}
        assert json.loads((tmp_path / "ours" / "adapter.json").read_text())["classes"] == said
        with safe_open(tmp_path / "merged.safetensors", "pt") as file:
            assert json.loads(file.metadata()["lora_plugins.classes"]) == said
        model = Described() if target is None else Described().net
        LoraModel.load_adapter(model, tmp_path / "ours")

    @pytest.mark.parametrize(
        ("said", "left_out"),
        [
            (dict.fromkeys(sorted(OWN_ENTRIES), "mine"), "'adapter_name', 'base'"),
            ({"classes": ["a"], "sizes": {1, 2}}, "'sizes'"),
            (None, "None"),
        ],
        ids=["names_of_the_manifest", "no_json", "no_mapping"],
    )
    def test_does_not_cost_the_adapter(self, tmp_path, said, left_out):
        class Misdescribed(Classifier):
            def file_entries(self, target):
                return said

        callback = LoraCallback(
            LoraConfig(r=2, target_modules=["net.0"]),
            save_adapter_to=tmp_path / "a",
            export_to=tmp_path / "m.safetensors",
        )
        with pytest.warns(UserWarning, match=re.escape(f"of Misdescribed returns {left_out}")):
            trainer(tmp_path, [callback]).fit(Misdescribed(), loader())
        LoraModel.load_adapter(Classifier(), tmp_path / "a")
        assert ("classes" in json.loads((tmp_path / "a" / "adapter.json").read_text())) == ("classes" in (said or {}))

    def test_is_in_the_adapter_though_it_cannot_be_merged(self, tmp_path):
        """The files are written before the merge, whole."""

        class Diverged(Described):
            def on_train_end(self):
                self.net[0].lora_B["default"].data.fill_(float("nan"))

        callback = LoraCallback(LoraConfig(r=2, target_modules=["net.0"]), save_adapter_to=tmp_path / "a")
        with pytest.raises(MergeError, match="not finite"):
            trainer(tmp_path, [callback]).fit(Diverged(), loader())
        assert "classes" in json.loads((tmp_path / "a" / "adapter.json").read_text())
