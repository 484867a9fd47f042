"""The README and the docs: every example runs, every link leads somewhere, every public name and hook is there."""

import doctest
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import griffe
import pluggy
import pytest
import torch
import yaml

import lora_plugins
from lora_plugins import FORMATS, INITS, STORAGES, VARIANTS, PluginKind, build_registry
from lora_plugins.cli import installed_commands
from lora_plugins.cli.main import main
from lora_plugins.integrations.lightning.cli.recipes import recipes
from lora_plugins.plugins import hookspecs

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), ROOT / "changelog.d" / "README.md", *sorted(DOCS.rglob("*.md"))]
PUBLIC = (
    "lora_plugins",
    "lora_plugins.integrations.lightning",
    "lora_plugins.integrations.transformers",
    "lora_plugins.integrations.diffusers",
    "lora_plugins.tasks",
    "lora_plugins.formats",
    "lora_plugins.testing",
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of a language, each with the number of the line before it."""
    text = page.read_text()
    found = [match for match in FENCE.finditer(text) if match.group(1) == language]
    return [(text[: match.start(2)].count("\n"), match.group(2)) for match in found]


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:GPU available but not used:UserWarning")
@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode:UserWarning")  # norm="freeze" holds them there
@pytest.mark.filterwarnings("ignore:The number of training batches:UserWarning")
@pages
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In the order of their page, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(f"example_of_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), vars(module))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
@pages
def test_configurations_are_planned_and_fitted(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _, text in blocks(page, "yaml"):
        Path("file.yaml").write_text(text)
        assert isinstance(yaml.safe_load(text), dict)
        assert main(["plan", "--config", "file.yaml"]) == 0, capsys.readouterr().err
        assert main(["fit", "--config", "file.yaml", "--trainer.fast_dev_run", "1"]) == 0, capsys.readouterr().err


COMMANDS = installed_commands().table
PROGRAMS = {"lightning": 1, "lora-plugins": 1, "python -m lora_plugins": 3}
"""Our programs, and how many words their names have."""


@pages
def test_commands_exist(page: Path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [
        line for language in ("", "sh", "bash") for _, text in blocks(page, language) for line in text.splitlines()
    ]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert {word for word in words[1:] if "=" not in word} <= targets, line
        for program, length in PROGRAMS.items():
            if words[:length] == program.split():
                assert words[length] in COMMANDS, line
                config = words[words.index("--config") + 1] if "--config" in words else ""
                assert not config.startswith("tasks/") or (ROOT / config).is_file(), line


@pages
def test_links_lead_somewhere(page: Path):
    """The build checks the pages of the site; those at the top of the repository are not among them."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_recipes_have_a_row():
    rows = re.findall(
        r"`recipe:(\w+)`", (DOCS / "tasks.md").read_text().partition("| recipe |")[2].partition("\n\n")[0]
    )
    assert sorted(rows) == sorted(recipes())


def test_extras_are_named():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install = (ROOT / "README.md").read_text().partition("## Install")[2].partition("\n## ")[0]
    assert not {name for name in extras if f"[{name}]" not in install and f"`{name}`" not in install}


@pytest.mark.parametrize(
    ("kind", "page"), [(INITS, "inits"), (VARIANTS, "variants"), (FORMATS, "formats"), (STORAGES, "quantize")]
)
def test_builtin_plugins_are_on_their_page(kind: PluginKind, page: str):
    text = (DOCS / "howto" / f"{page}.md").read_text()
    assert not {name for name in build_registry(allow=[]).of(kind) if name not in text}


def test_hooks_are_those_of_the_live_manager():
    manager = pluggy.PluginManager(hookspecs.GROUP)
    manager.add_hookspecs(hookspecs)
    signatures = {
        f"{name}({', '.join(inspect.signature(getattr(hookspecs, name)).parameters)})"
        for name in vars(manager.hook)
        if not name.startswith("_")
    }
    text = (DOCS / "hooks.md").read_text()
    assert signatures == set(re.findall(r"^## (.*)$", text, re.MULTILINE))
    included = set(re.findall(r"^::: lora_plugins\.plugins\.hookspecs\.(\w+)$", text, re.MULTILINE))
    assert included == {signature.partition("(")[0] for signature in signatures}


@pytest.mark.parametrize("module", PUBLIC)
def test_examples_of_docstrings_run(module: str):
    package = importlib.import_module(module)
    objects = [getattr(package, name) for name in package.__all__]
    sources = {obj.__module__ for obj in objects if hasattr(obj, "__module__")}
    known = {"torch": torch, "nn": torch.nn, **{name: getattr(lora_plugins, name) for name in lora_plugins.__all__}}
    for source in sorted(sources & sys.modules.keys()):
        if source.startswith("lora_plugins"):
            result = doctest.testmod(sys.modules[source], extraglobs=known)
            assert not result.failed, source


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The package as the reference sees it: read, not imported."""
    spec = importlib.util.spec_from_file_location("lora_plugins_docs_layout", DOCS / "layout.py")
    layout = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layout)
    folder = tmp_path_factory.mktemp("sources")
    layout.copy_package(folder)
    loader = griffe.GriffeLoader(search_paths=[str(folder)])
    found = loader.load("lora_plugins", try_relative_path=False)
    loader.resolve_aliases()
    return found


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_documented(module: str, package):
    reference = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    assert f"<!-- every public name of {module} -->" in reference
    found = package[module.removeprefix("lora_plugins.")] if module != "lora_plugins" else package
    names = importlib.import_module(module).__all__
    bare = [name for name in names if not found[name].has_docstring and name != "hookimpl"]
    bare += [
        f"{name}.{member.name}"
        for name in names
        for member in found[name].members.values()
        if found[name].is_class and member.is_function and member.name[0] != "_" and not member.has_docstring
    ]
    assert not bare


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path: Path):
    """A broken link, a page that the navigation lacks or a name that cannot be found fails, as in `make lint`."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    silent = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=silent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    core = (tmp_path / "api" / "core" / "index.html").read_text()
    assert all(f'id="lora_plugins.{name}"' in core for name in lora_plugins.__all__)
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', page.read_text())
        assert not fetched, f"{page.name} fetches {fetched}"


def test_the_table_of_states_is_the_one_that_is_executed():
    from lora_plugins.adapter import CALLS

    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", (DOCS / "states.md").read_text(), re.MULTILINE)
    assert rows == [(name, call.effect, ", ".join(call.refused) or "-") for name, call in CALLS.items()]
