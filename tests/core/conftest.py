"""What the tests of the core share."""

import importlib
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lora_plugins.plugins import default_registry
from tests.core.file_cases import adapt, build, output

TESTS = Path(__file__).parent.parent

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_pre_hooks", "_state_dict_hooks")


def fingerprint_of(model):
    """Everything about a model that an operation which touches nothing leaves as it is."""
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        "classes": {name: type(module) for name, module in modules.items()},
        "identities": {name: id(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, hooks)) for hooks in _HOOKS] for name, module in modules.items()},
        "gradients": {name: p.requires_grad for name, p in model.named_parameters()},
        "parameters": {name: (id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)},
        "tensors": {name: (t.dtype, tuple(t.shape), t.tolist()) for name, t in model.state_dict().items()},
        "random state": torch.get_rng_state().tolist(),
    }


@pytest.fixture(scope="session")
def untouched():
    """A context manager that fails if the block changed anything about a model, or drew a random number."""

    @contextmanager
    def check(model):
        before = fingerprint_of(model)
        yield
        after = fingerprint_of(model)
        assert [what for what in before if before[what] != after[what]] == []

    return check


@pytest.fixture(scope="session")
def installed(tmp_path_factory):
    """Installs one of the plugin distributions beside this folder by pip, once; returns the folder it is in."""
    folders: dict[str, Path] = {}

    def install(name):
        if name not in folders:
            work = tmp_path_factory.mktemp(name)
            # A build leaves its traces beside the sources, so it works on a copy.
            shutil.copytree(TESTS / name, work / "source")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
            offline = ["--no-index", "--no-build-isolation", "--target", str(work / "site"), str(work / "source")]
            subprocess.run([*pip, *offline], check=True)
            folders[name] = work / "site"
        return folders[name]

    return install


@pytest.fixture
def with_plugins(installed, monkeypatch):
    """Makes installed plugin distributions visible to this process, for the duration of one test."""
    default_registry()  # which the process keeps, is made without them
    loaded = set(sys.modules)

    def add(*names):
        for name in names:
            monkeypatch.syspath_prepend(str(installed(name)))
        importlib.invalidate_caches()

    yield add
    for name in set(sys.modules) - loaded:
        if name.startswith(
            (
                "lora_plugins_example",
                "lora_plugins_broken",
                "lora_plugins_clash",
                "lora_plugins_npz",
                "lora_plugins_fp8",
            )
        ):
            del sys.modules[name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """An adapter folder, and what the adapted model computes."""
    model = build()
    lora = adapt(model, modules_to_save=["head"], rank_pattern={"qkv": 3}, alpha_pattern={"stem": 2.0})
    return lora.save_adapter(tmp_path_factory.mktemp("saved") / "adapter"), output(model)


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of that folder, to be damaged."""
    for path in saved[0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.fixture
def compiler_as_new():
    """Forgets graphs: tests share classes and functions, of which the compiler keeps a few graphs only."""
    torch._dynamo.reset()
