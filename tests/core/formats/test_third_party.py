"""A format of a third party: a real distribution, found by its entry point, told by its files."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lora_plugins import AdapterFileError, LoraConfig, LoraModel, PluginError
from lora_plugins.formats import PortableAdapter, PortableFormat, PortableLayer, UntoldError, convert
from lora_plugins.plugins import FORMATS, build_registry
from lora_plugins.testing import FORMAT_CHECKS
from tests.core.formats.peft_cases import CASES, difference, with_ours
from tests.core.processes import run_python, run_tests
from tests.core.registries import registry_of

LINEAR = CASES[0]


@pytest.fixture
def registry(with_plugins):
    with_plugins("plugin_format")
    return build_registry()


def adapted(registry, **fields):
    lora = with_ours(LINEAR, **fields)
    return LoraModel(lora.model, registry=registry)


def test_it_is_listed_with_its_distribution_and_version(registry):
    (info,) = [info for info in registry.plugins if info.name == "npz"]
    assert (info.distribution, info.version, info.names(FORMATS)) == ("lora-plugins-npz", "0.3.0", ("npz",))


def test_it_writes_and_is_told_by_its_files(registry, tmp_path):
    lora = adapted(registry)
    path = lora.save_adapter(tmp_path / "adapter.npz", format="npz")
    model = LINEAR.build()
    LoraModel.load_adapter(model, path, registry=registry)
    assert difference(LINEAR, model, lora.model) == 0


def test_the_folder_of_its_file_is_made_where_there_is_none(registry, tmp_path):
    lora = adapted(registry)
    path = lora.save_adapter(tmp_path / "new" / "folder" / "adapter.npz", format="npz")
    format = registry.get(FORMATS, "npz")
    again = convert(path, format, {}, tmp_path / "other" / "adapter.npz", format, {})
    assert again.is_file()
    with pytest.raises(AdapterFileError, match="has no form in an archive"):
        adapted(registry, variant="dora").save_adapter(tmp_path / "none" / "adapter.npz", format="npz")
    assert not (tmp_path / "none").exists()


def test_it_writes_under_the_name_that_it_is_given(registry, tmp_path):
    path = adapted(registry).save_adapter(tmp_path / "adapter", format="npz")
    assert [*tmp_path.iterdir()] == [path]
    LoraModel.load_adapter(LINEAR.build(), path, registry=registry)


def test_it_refuses_by_name_what_it_cannot_say(registry, tmp_path):
    lora = adapted(registry, variant="dora")
    with pytest.raises(AdapterFileError, match=r"'inner\.fc' has no form in an archive"):
        lora.save_adapter(tmp_path / "adapter.npz", format="npz")
    assert not (tmp_path / "adapter.npz").exists()


def test_a_pickle_in_it_is_refused(registry, tmp_path, untouched):
    import numpy as np

    np.savez(tmp_path / "adapter.npz", **{"fc/alpha": np.array([object()])})
    model = LINEAR.build()
    with untouched(model), pytest.raises(AdapterFileError, match=r"damaged.*allow_pickle"):
        LoraModel.load_adapter(model, tmp_path / "adapter.npz", registry=registry)


class Failing(PortableFormat):
    name = "failing"

    def recognizes(self, path):
        return path.read_text() == "failing"

    def load(self, path, model, options):
        raise ValueError("no license server")

    def save(self, path, adapter, model, options):
        raise ValueError("no license server")


class Empty(Failing):
    def load(self, path, model, options):
        return PortableAdapter({})


@pytest.mark.parametrize(
    ("content", "format", "place"),
    [
        (b"\xff", None, "recognizes() of the format 'failing', for {}"),
        (b"failing", None, "the format 'failing', reading {}"),
        (b"\xff", "failing", "the format 'failing', reading {}"),
    ],
    ids=["recognizes", "load", "load by name"],
)
def test_an_error_in_reading_is_told_with_its_place(content, format, place, tmp_path, untouched):
    path = tmp_path / "adapter"
    path.write_bytes(content)
    model = LINEAR.build()
    with untouched(model), pytest.raises(ValueError, match=r"license|decode") as caught:
        LoraModel.load_adapter(model, path, format=format, registry=registry_of(Failing()))
    assert caught.value.__notes__ == [f"It was raised in {place.format(path)}."]


def test_an_error_in_writing_is_told_with_its_place(tmp_path):
    with pytest.raises(ValueError, match="license") as caught:
        adapted(registry_of(Failing())).save_adapter(tmp_path / "adapter", format="failing")
    assert caught.value.__notes__ == [f"It was raised in the format 'failing', writing {tmp_path / 'adapter'}."]


def test_a_file_without_layers_is_refused(tmp_path):
    path = tmp_path / "adapter"
    path.write_text("failing")
    with pytest.raises(AdapterFileError, match="has no layers, so there is nothing to load"):
        LoraModel.load_adapter(LINEAR.build(), path, registry=registry_of(Empty()))


PAIR = PortableLayer(torch.ones(2, 4), torch.ones(6, 2), 1.0)


class OfTwoReadings(Failing):
    options = {"scale": None}  # noqa: RUF012
    first_reading = {"scale": 3.0}  # noqa: RUF012

    def load(self, path, model, options):
        if options["scale"] is None:
            raise UntoldError("Say the alpha by format_options={'scale': ...}.")
        return PortableAdapter({"inner.fc": replace(PAIR, alpha=options["scale"])})


def test_a_file_of_two_readings_is_shown_by_the_first_and_loaded_by_the_one_that_is_said(tmp_path, untouched):
    path, registry = tmp_path / "adapter", registry_of(OfTwoReadings())
    path.write_text("failing")
    summary = OfTwoReadings().summary(path)
    assert [layer.alpha for layer in summary.layers] == [3.0]
    assert summary.details == {"to be said": "Say the alpha by format_options={'scale': ...}."}
    model = nn.ModuleDict({"inner": nn.ModuleDict({"fc": nn.Linear(4, 6)})})
    with untouched(model), pytest.raises(UntoldError, match="Say the alpha"):
        LoraModel.load_adapter(model, path, registry=registry)
    base = model["inner"]["fc"].weight.detach().clone()
    LoraModel.load_adapter(model, path, registry=registry, format_options={"scale": 6.0}).merge_and_unload()
    torch.testing.assert_close(model["inner"]["fc"].weight.detach(), base + 6 / 2 * PAIR.B @ PAIR.A)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "gives None, which is no PortableAdapter"),
        ({"fc": PAIR}, "which is no PortableAdapter"),
        (PortableAdapter([("fc", PAIR)]), "gives layers that are .*, and no mapping by full names"),
        (PortableAdapter({3: PAIR}), "gives layers that are .*, and no mapping by full names"),
        (PortableAdapter({"fc": (1, 2, 3)}), r"gives \(1, 2, 3\) for 'fc', which is no PortableLayer"),
        (
            PortableAdapter({"fc": replace(PAIR, A=[[1.0]])}),
            r"gives \[\[1.0\]\] for A of 'fc', which is no dense tensor",
        ),
        (PortableAdapter({"fc": replace(PAIR, B=PAIR.B.to_sparse())}), "for B of 'fc', which is no dense tensor"),
        (PortableAdapter({"fc": replace(PAIR, B=PAIR.B.to("meta"))}), "for B of 'fc', which is no dense tensor"),
        (PortableAdapter({"fc": replace(PAIR, B=torch.ones(6))}), r"gives \(6,\) for B of 'fc', which is no matrix"),
        (PortableAdapter({"fc": replace(PAIR, magnitude=[1.0])}), r"\[1.0\] for magnitude of 'fc', which is no dense"),
        (PortableAdapter({"fc": replace(PAIR, alpha=torch.ones(2))}), "for alpha of 'fc', which is no number"),
        (PortableAdapter({"fc": PAIR}, values=None), "gives values that are None"),
        (PortableAdapter({"fc": PAIR}, values={"out.bias": 1.5}), "gives 1.5 for 'out.bias', which is no dense tensor"),
        (PortableAdapter({"fc": PAIR}, name="style.v2"), "gives the name 'style.v2', where an adapter's has letters"),
    ],
    ids=[
        "none",
        "layers",
        "a list",
        "a number",
        "a tuple",
        "lists",
        "sparse",
        "meta",
        "squeezed",
        "magnitude",
        "alpha",
        "no values",
        "value",
        "name",
    ],
)
def test_a_wrong_answer_is_told_and_nothing_is_touched(answer, message, tmp_path, untouched):
    path = tmp_path / "adapter"
    path.write_text("failing")
    answering = type("Answering", (Failing,), {"load": lambda *_: answer})()
    model = LINEAR.build()
    with untouched(model), pytest.raises(PluginError, match=rf"load\(\) of the format 'failing' .*{message}"):
        LoraModel.load_adapter(model, path, registry=registry_of(answering))


def test_without_it_nobody_knows_the_format(registry, tmp_path):
    path = adapted(registry).save_adapter(tmp_path / "adapter.npz", format="npz")
    alone = build_registry(allow=())
    with pytest.raises(AdapterFileError, match="of none of the formats"):
        LoraModel.load_adapter(LINEAR.build(), path, registry=alone)
    with pytest.raises(PluginError, match="There is no format 'npz'"):
        LoraModel(nn.Sequential(nn.Linear(2, 2)), LoraConfig(), registry=alone).save_adapter(tmp_path, format="npz")


def test_two_formats_that_know_one_file_are_told(registry, tmp_path):
    class Greedy(type(registry.get(FORMATS, "npz"))):
        name = "greedy"

    path = adapted(registry).save_adapter(tmp_path / "adapter.npz", format="npz")
    both = registry_of(Greedy())
    with pytest.raises(AdapterFileError, match=r"can be of the formats .*'greedy'.*format='"):
        LoraModel.load_adapter(LINEAR.build(), path, registry=both)
    model = LINEAR.build()
    LoraModel.load_adapter(model, path, format="npz", registry=both)
    assert "default" in model.fc.lora_A


@pytest.mark.slow
def test_its_own_tests_pass_where_it_is_installed(installed):
    site = installed("plugin_format")
    of_types = 4  # what the package tests besides
    assert f"{len(FORMAT_CHECKS) + of_types} passed" in run_tests(site.parent / "source", site)


def test_the_command_converts_by_it(installed, tmp_path):
    """Between two formats that know layers by name no model is needed."""
    with_ours(LINEAR).save_adapter(tmp_path / "a", format="peft")
    arguments = ["convert", str(tmp_path / "a"), str(tmp_path / "b.npz"), "--to", "npz"]
    for call in (arguments, ["inspect", str(tmp_path / "b.npz")]):
        done = run_python("-P", "-m", "lora_plugins", *call, paths=[installed("plugin_format")])
        assert done.returncode == 0, done.stderr
    assert "format: npz" in done.stdout
