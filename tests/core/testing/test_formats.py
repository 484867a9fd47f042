"""The built-in formats pass the kit, and each check fails on a format that violates it."""

import contextlib
import io
import json
import pickle
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from lora_plugins import AdapterFileError, ConfigError
from lora_plugins.formats import PortableAdapter, PortableFormat, PortableLayer, replace_files
from lora_plugins.formats.comfyui import ComfyFormat
from lora_plugins.formats.diffusers import DiffusersFormat
from lora_plugins.formats.kohya import KohyaFormat
from lora_plugins.formats.own import OwnFormat
from lora_plugins.formats.peft import PeftFormat
from lora_plugins.plugins import AdapterSummary
from lora_plugins.testing import FORMAT_CHECKS, CheckError, check_format_plugin
from tests.core.testing.violations import assert_found

IN_A_PIPELINE = {"component": "unet"}


def test_ours(format_check):
    format_check(OwnFormat())


def test_peft(format_check):
    format_check(PeftFormat())


def test_diffusers(format_check):
    format_check(DiffusersFormat(), options=IN_A_PIPELINE)


def test_kohya(format_check):
    format_check(KohyaFormat(), "adapter.safetensors", options=IN_A_PIPELINE)


def test_comfyui(format_check):
    format_check(ComfyFormat(), "adapter.safetensors", options=IN_A_PIPELINE)


class Locking(PeftFormat):
    def __init__(self):
        self.lock = threading.Lock()


def test_one_that_cannot_be_copied(format_check):
    format_check(Locking())


class Unnamed(PeftFormat):
    name = ""


class KnowsEverything(PeftFormat):
    def recognizes(self, path):
        return True


class KnowsNothing(PeftFormat):
    def recognizes(self, path):
        return False


class RaisesForStrangers(PeftFormat):
    def recognizes(self, path):
        return bool(path.read_bytes()) if path.suffix else super().recognizes(path)


def changed(adapter, change):
    return replace(adapter, layers={name: change(layer) for name, layer in adapter.layers.items()})


class OneAlpha(PeftFormat):
    def save(self, path, adapter, model, options):
        return super().save(path, changed(adapter, lambda layer: replace(layer, alpha=3.0)), model, options)


class KeepsAlphas(PeftFormat):
    """In the plugin object."""

    def save(self, path, adapter, model, options):
        self.kept = {name: layer.alpha for name, layer in adapter.layers.items()}
        return super().save(path, changed(adapter, lambda layer: replace(layer, alpha=1.0)), model, options)

    def load(self, path, model, options):
        adapter, kept = super().load(path, model, options), getattr(self, "kept", {})
        layers = {name: replace(layer, alpha=kept.get(name, layer.alpha)) for name, layer in adapter.layers.items()}
        return replace(adapter, layers=layers)


class WholeAlphas(PeftFormat):
    def save(self, path, adapter, model, options):
        whole = changed(adapter, lambda layer: replace(layer, alpha=float(int(layer.alpha))))
        return super().save(path, whole, model, options)


class AlphasAsText(PeftFormat):
    """Of six digits."""

    def save(self, path, adapter, model, options):
        text = changed(adapter, lambda layer: replace(layer, alpha=float(f"{layer.alpha:g}")))
        return super().save(path, text, model, options)


class OneForAll(PeftFormat):
    """Has one value for all layers, of what is told apart."""

    def __init__(self, *told_apart):
        self.told_apart = told_apart

    def refusals(self, adapter):
        of_layers = {tuple(getattr(each, name) for name in self.told_apart) for each in adapter.layers.values()}
        return [*super().refusals(adapter), *(["layers that differ"] if len(of_layers) > 1 else [])]


@pytest.mark.parametrize("told_apart", [["alpha"], ["r", "alpha"], ["r"]], ids=" and ".join)
def test_one_value_for_all_layers(format_check, told_apart):
    format_check(OneForAll(*told_apart))


class OneRankAndAlpha(OneForAll):
    """Refuses layers of different ranks, and writes one alpha for all without a word."""

    def save(self, path, adapter, model, options):
        alpha = min(layer.alpha for layer in adapter.layers.values())
        return super().save(path, changed(adapter, lambda layer: replace(layer, alpha=alpha)), model, options)


def test_alphas_differ_where_ranks_cannot():
    with pytest.raises(CheckError):
        check_format_plugin(OneRankAndAlpha("r"))


class Scaled(PeftFormat):
    """Moves a factor from the scaling into B."""

    def save(self, path, adapter, model, options):
        scaled = changed(adapter, lambda layer: replace(layer, B=layer.B * 1.1, alpha=layer.alpha / 1.1))
        return super().save(path, scaled, model, options)


class LeavesOut(PeftFormat):
    """Writes A and B, and nothing else that an adapter may have."""

    def refusals(self, adapter):
        return ()

    def save(self, path, adapter, model, options):
        alone = changed(adapter, lambda layer: replace(layer, magnitude=None))
        return super().save(path, replace(alone, values={}), model, options)


class WritesFirst(PeftFormat):
    def write(self, path, packed, model, registry, options):
        path.mkdir()
        return super().write(path, packed, model, registry, options)

    def refusals(self, adapter):
        return ["everything"] if adapter.values else ()


class InPlace(PeftFormat):
    def save(self, path, adapter, model, options):
        next(model.parameters()).data.mul_(2)
        return super().save(path, adapter, model, options)


class Skips(PeftFormat):
    def load(self, path, model, options):
        adapter = super().load(path, None, options)
        known = {} if model is None else dict(model.named_modules())
        return replace(
            adapter, layers={name: each for name, each in adapter.layers.items() if name in known or not model}
        )


class PassesErrorsOn(PeftFormat):
    def load(self, path, model, options):
        try:
            return super().load(path, model, options)
        except AdapterFileError as error:
            raise ValueError(str(error)) from error


class WhateverLiesThere(PortableFormat):
    """A file for each layer, with tensors that are asked for by name; all files that lie in the folder are read."""

    name = "files"

    def recognizes(self, path):
        return path.is_dir() and any(path.glob("*.safetensors"))

    def load(self, path, model, options):
        tensors = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
        return PortableAdapter(
            {name: PortableLayer(each["A"], each["B"], float(each["alpha"])) for name, each in tensors.items()}
        )

    def save(self, path, adapter, model, options):
        path.mkdir(exist_ok=True)
        for name, layer in adapter.layers.items():
            alpha = torch.tensor(layer.alpha, dtype=torch.float64)
            save_file({"A": layer.A, "B": layer.B, "alpha": alpha}, path / f"{name}.safetensors")
        return path


class KeepsWhatItRead(PeftFormat):
    def __init__(self):
        self.adapters = {}

    def load(self, path, model, options):
        return self.adapters.setdefault(path, super().load(path, model, options))


class AlphasLast(PortableFormat):
    """A folder with a file for each layer, and the list of them, which is written last."""

    name = "alphas_last"

    def recognizes(self, path):
        return (path / "alphas.json").is_file()

    def load(self, path, model, options):
        alphas = json.loads((path / "alphas.json").read_text())
        files = {name: load_file(path / f"{name}.safetensors") for name in alphas}
        return PortableAdapter({name: PortableLayer(**files[name], alpha=alpha) for name, alpha in alphas.items()})

    def save(self, path, adapter, model, options):
        path.mkdir(exist_ok=True)
        self.put(
            {
                **{
                    path / f"{name}.safetensors": save({"A": each.A, "B": each.B})
                    for name, each in adapter.layers.items()
                },
                path / "alphas.json": json.dumps({name: each.alpha for name, each in adapter.layers.items()}).encode(),
            }
        )
        return path

    def put(self, files):
        for file, data in files.items():
            file.write_bytes(data)


class FactorsApart(AlphasLast):
    """A folder with a file for all A, one for all B, each replaced by itself, and the alphas."""

    name = "factors_apart"

    def load(self, path, model, options):
        alphas = json.loads((path / "alphas.json").read_text())
        try:
            A, B = (load_file(path / f"{factor}.safetensors") for factor in "AB")
        except Exception as error:
            raise AdapterFileError(f"{path} is damaged: {error}") from error
        return PortableAdapter({name: PortableLayer(A[name], B[name], alpha) for name, alpha in alphas.items()})

    def save(self, path, adapter, model, options):
        path.mkdir(exist_ok=True)
        for factor in "AB":
            tensors = {name: getattr(each, factor) for name, each in adapter.layers.items()}
            replace_files({path / f"{factor}.safetensors": save(tensors)})
        self.put({path / "alphas.json": json.dumps({name: e.alpha for name, e in adapter.layers.items()}).encode()})
        return path


class AllOrNone(AlphasLast):
    def put(self, files):
        replace_files(files)


def test_all_files_or_none_pass_on_a_full_disk():
    check_format_plugin(AllOrNone(), only=["full disk", "output", "replaced"])


class InOneFile(PortableFormat):
    """A file of any name, whose tensors are asked for by theirs; alphas are in its header."""

    name = "in_one_file"

    def recognizes(self, path):
        try:
            with safe_open(path, "pt") as file:
                return "alphas" in (file.metadata() or {})
        except Exception:
            return False

    def load(self, path, model, options):
        with safe_open(path, "pt") as file:
            alphas = json.loads(file.metadata()["alphas"])
            layers = {
                name: PortableLayer(file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B"), alpha)
                for name, alpha in alphas.items()
            }
        return PortableAdapter(layers)

    def save(self, path, adapter, model, options):
        alphas = {name: each.alpha for name, each in adapter.layers.items()}
        tensors = {f"{name}.A": each.A for name, each in adapter.layers.items()}
        tensors |= {f"{name}.B": each.B for name, each in adapter.layers.items()}
        save_file(tensors, path, {"alphas": json.dumps(alphas)})
        return path


class KnowsEveryTensorFile(InOneFile):
    def recognizes(self, path):
        try:
            with safe_open(path, "pt"):
                return True
        except Exception:
            return False


class WithAnEnding(InOneFile):
    """Writes to another name than the one that it is given, as `np.savez` does, unless that ends as it wants."""

    def save(self, path, adapter, model, options):
        super().save(path.with_suffix(".lora"), adapter, model, options)
        return path


class SaysItsEnding(InOneFile):
    """Returns that other name, which whoever gave the first one does not look at."""

    def save(self, path, adapter, model, options):
        return super().save(path.with_suffix(".lora"), adapter, model, options)


def test_a_file_of_another_name_that_is_returned_is_found():
    with pytest.raises(CheckError, match=r"'any_name' was to be written, and 'any_name\.lora' was"):
        check_format_plugin(SaysItsEnding(), "adapter.lora", only=["recognized"])


def test_a_file_of_another_name_than_the_given_one_is_found():
    with pytest.raises(CheckError, match=r"fails the check 'recognized'(?s:.*)Did you mean 'any_name\.lora'"):
        check_format_plugin(WithAnEnding(), "adapter.lora", only=["recognized"])


class TurnsKernels(PeftFormat):
    def load(self, path, model, options):
        adapter = super().load(path, model, options)
        return changed(adapter, lambda layer: replace(layer, A=layer.A.mT if layer.A.dim() == 4 else layer.A))


class Squeezes(InOneFile):
    def save(self, path, adapter, model, options):
        squeezed = changed(adapter, lambda layer: replace(layer, A=layer.A.squeeze(), B=layer.B.squeeze()))
        return super().save(path, squeezed, model, options)


class ByLastName(InOneFile):
    def save(self, path, adapter, model, options):
        layers = {name.rpartition(".")[2]: layer for name, layer in adapter.layers.items()}
        return super().save(path, replace(adapter, layers=layers), model, options)

    def load(self, path, model, options):
        adapter = super().load(path, model, options)
        full = {name.rpartition(".")[2]: name for name, _ in model.named_modules()}
        return replace(adapter, layers={full[name]: layer for name, layer in adapter.layers.items()})


class InSmallLetters(InOneFile):
    def save(self, path, adapter, model, options):
        layers = {name.lower(): layer for name, layer in adapter.layers.items()}
        return super().save(path, replace(adapter, layers=layers), model, options)


class WithoutDots(InOneFile):
    """Has '_' for each dot in a name, as kohya's keys do, and does not look whether that names two layers."""

    def save(self, path, adapter, model, options):
        layers = {name.replace(".", "_"): layer for name, layer in adapter.layers.items()}
        return super().save(path, replace(adapter, layers=layers), model, options)

    def load(self, path, model, options):
        adapter = super().load(path, model, options)
        full = {name.replace(".", "_"): name for name, _ in model.named_modules()}
        return replace(adapter, layers={full[name]: layer for name, layer in adapter.layers.items()})


class KnowsFoldersWithJson(WhateverLiesThere):
    def recognizes(self, path):
        return path.is_dir() and any(path.glob("*.json"))

    def save(self, path, adapter, model, options):
        super().save(path, adapter, model, options)
        (path / "layers.json").write_text(json.dumps([*adapter.layers]))
        return path


class KeepsItsPath(InOneFile):
    """A folder whose index names the other file by its whole path."""

    def recognizes(self, path):
        return (path / "index").is_file()

    def load(self, path, model, options):
        return super().load((path / "index").read_text(), model, options)

    def save(self, path, adapter, model, options):
        path.mkdir(exist_ok=True)
        (path / "index").write_text(str(super().save(path.absolute() / "data", adapter, model, options)))
        return path


class LeavesEvalMode(PeftFormat):
    def load(self, path, model, options):
        adapter = super().load(path, model, options)
        if model is not None:
            model.train()
        return adapter


class NotesWhatItRead(PeftFormat):
    """Keeps a list of what it read, in whatever folder it is called from."""

    def load(self, path, model, options):
        with open("read.txt", "a") as file:
            file.write(f"{path}\n")
        return super().load(path, model, options)


class DrawsNumbers(PeftFormat):
    def load(self, path, model, options):
        torch.rand(1)
        return super().load(path, model, options)


class Silent(PeftFormat):
    def summary(self, path):
        return AdapterSummary(())


class Pickles(InOneFile):
    """Knows its file by unpickling it."""

    safe = False

    def recognizes(self, path):
        return path.is_file() and bool(self.read_all(path))

    def read_all(self, path):
        try:
            return torch.load(path, weights_only=self.safe)
        except Exception:
            return None

    def load(self, path, model, options):
        return PortableAdapter({name: PortableLayer(*each) for name, each in self.read_all(path).items()})

    def save(self, path, adapter, model, options):
        torch.save({name: (each.A, each.B, each.alpha) for name, each in adapter.layers.items()}, path)
        return path


class PicklesSafely(Pickles):
    safe = True


def test_what_torch_reads_without_running_it_is_no_pickle():
    check_format_plugin(PicklesSafely(), only=["pickle", "output"])


class ImportsAsItReads(PicklesSafely):
    """A library that keeps what reads pickles, as cloudpickle does."""

    def load(self, path, model, options):
        import keeps_loads  # noqa: F401

        return super().load(path, model, options)


def test_libraries_that_a_format_imports_can_unpickle_afterwards(tmp_path, monkeypatch):
    (tmp_path / "keeps_loads.py").write_text("from pickle import loads\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_format_plugin(ImportsAsItReads(), only=["pickle"])
    assert sys.modules.pop("keeps_loads").loads is pickle.loads


class OfC(pickle.Unpickler):
    pass


class OfPython(pickle._Unpickler):
    """As the one of joblib is."""


READERS = {
    "a function that a module has taken": pickle.loads,
    "a class derived from C": lambda data: OfC(io.BytesIO(data)).load(),
    "a class derived from Python": lambda data: OfPython(io.BytesIO(data)).load(),
}


class Caches(PeftFormat):
    """Has a pickle beside its files, and does without where that cannot be read."""

    def __init__(self, read):
        self.read_pickle = read

    def load(self, path, model, options):
        with contextlib.suppress(Exception):
            self.read_pickle(pickle.dumps([1.0]))
        return super().load(path, model, options)


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_pickle_is_noticed_whatever_reads_it(read):
    with pytest.raises(CheckError, match=r"a pickle is read in .*test_formats\.py, line \d+"):
        check_format_plugin(Caches(read), only=["pickle"])


def test_the_profile_of_the_process_is_what_it_was():
    def profile(frame, event, called):
        pass

    sys.setprofile(profile)
    try:
        check_format_plugin(PeftFormat(), only=["pickle"])
        assert sys.getprofile() is profile
    finally:
        sys.setprofile(None)


VIOLATIONS = {
    "registration": [Unnamed],
    "recognized": [KnowsEverything, KnowsNothing, KnowsEveryTensorFile, KnowsFoldersWithJson, RaisesForStrangers],
    "output": [OneAlpha, KeepsAlphas, WholeAlphas, AlphasAsText, KeepsItsPath],
    "bits": [Scaled],
    "replaced": [WhateverLiesThere, KeepsWhatItRead],
    "full disk": [WhateverLiesThere, AlphasLast, FactorsApart],
    "whole": [LeavesOut, WritesFirst],
    "layers": [TurnsKernels, Squeezes, ByLastName, InSmallLetters, WithoutDots],
    "untouched": [InPlace, LeavesEvalMode, NotesWhatItRead, DrawsNumbers],
    "other model": [Skips],
    "damaged": [PassesErrorsOn],
    "surplus": [WhateverLiesThere, InOneFile],
    "pickle": [Pickles],
    "summary": [Silent],
}


def test_every_check_has_a_violation():
    assert list(VIOLATIONS) == list(FORMAT_CHECKS)


@pytest.mark.parametrize(
    ("name", "plugin"),
    [(name, plugin) for name, plugins in VIOLATIONS.items() for plugin in plugins],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_violation_fails_its_check(name, plugin):
    assert_found(name, lambda: check_format_plugin(plugin(), only=[name]))


def test_an_unknown_check_is_refused():
    with pytest.raises(ConfigError, match=r"no check 'summery'.*summary"):
        check_format_plugin(PeftFormat(), only=["summery"])
