"""What an import brings along, and under which names the parts of the project can be imported."""

import ast
import re
from pathlib import Path

import pytest

from tests.core.processes import assert_answered_without, run_python

ROOT = Path(__file__).parent.parent.parent
HEAVY = ("lightning", "lightning_fabric", "pytorch_lightning", "timm", "torchmetrics", "torchvision", "transformers")
"""None of them is needed to adapt a model in plain PyTorch."""

REPORT = f"import sys; print([name for name in {HEAVY!r} if name in sys.modules])"


def python(code):
    """Runs code in a fresh process, which does not find the checkout by itself."""
    return run_python("-P", "-c", code)


def test_the_core_imports_nothing_heavy():
    use = (
        "import lora_plugins, torch; "
        "lora_plugins.LoraModel(torch.nn.Sequential(torch.nn.Linear(2, 2)), lora_plugins.LoraConfig()); "
    )
    run = python(use + REPORT)
    assert (run.stdout.strip(), run.returncode) == ("[]", 0), run.stderr


def test_help_and_mistakes_do_not_wait_for_torch():
    """It takes seconds to import, and the answers need none of it."""
    commands = ("inspect", "convert", "plugins", "doctor", "new-plugin")
    lines = ["--help", "--version", "trian", *(f"{each} --help" for each in commands), "doctor --hlp", "inspect"]
    assert_answered_without(("torch", "numpy", "lightning"), lines)


def test_that_check_can_fail():
    """Without this, a check that looks at the wrong thing would pass for ever."""
    pytest.importorskip("torchvision")
    run = python("import lora_plugins, torchvision; " + REPORT)
    assert run.stdout.strip() == "['torchvision']", run.stderr


@pytest.mark.parametrize("folder", ["integrations", "tasks"])
def test_a_folder_refuses_any_name_but_its_own(folder):
    """From the root of a checkout both spellings could be imported, as two modules with two sets of classes."""
    run = python(f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}")
    assert run.returncode != 0
    assert f"Import it as 'lora_plugins.{folder}'" in run.stderr


def test_the_core_names_neither_integrations_nor_tasks():
    """Not even in a string that is imported later: what they add comes through entry points."""
    named = re.compile(r"lora_plugins[./](integrations|tasks)")
    files = sorted((ROOT / "lora_plugins").rglob("*.py"))
    assert len(files) > 50
    assert [str(path) for path in files if named.search(path.read_text())] == []


def test_its_own_name_works_from_anywhere():
    run = python("import lora_plugins.integrations")
    assert run.returncode == 0, run.stderr


def test_every_public_name_is_there_once():
    import lora_plugins

    assert len(set(lora_plugins.__all__)) == len(lora_plugins.__all__)
    assert [name for name in lora_plugins.__all__ if not hasattr(lora_plugins, name)] == []


def test_names_are_listed_before_they_are_used():
    """As an editor or a notebook asks for them."""
    run = python("import lora_plugins; assert {'LoraModel', '__doc__', *lora_plugins.__all__} <= {*dir(lora_plugins)}")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("lora_plugins.integrations.lightning.LoraCallback", "lightning", "lightning"),
        pytest.param("lora_plugins.integrations.lightning.LoraCallback", "rich", "lightning", marks=pytest.mark.slow),
        ("lora_plugins.integrations.lightning.LoraCLI", "jsonargparse", "lightning"),
        ("lora_plugins.integrations.transformers.LoraTrainer", "transformers", "transformers"),
        ("lora_plugins.integrations.diffusers.contact_sheet", "PIL", "diffusion"),
        ("lora_plugins.tasks.ImageClassificationTask", "torchvision", "vision"),
    ],
)
def test_a_missing_package_is_told_with_the_extra_that_brings_it(name, missing, extra):
    package, _, attribute = name.rpartition(".")
    run = python(f"import sys; sys.modules[{missing!r}] = None\nfrom {package} import {attribute}")
    *_, last = run.stderr.splitlines()
    assert re.fullmatch(rf".* needs \S+\. Run: pip install 'lora-plugins\[(lightning|{extra})\]'", last), run.stderr


MISSING_ON_WINDOWS = ("fcntl", "grp", "pwd", "resource", "termios")


def imported(tree):
    """Yields the name of each module that is imported, and whether a `try` is around it."""
    guarded = {inner for node in ast.walk(tree) if isinstance(node, ast.Try) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        yield from ((name, node in guarded) for name in names)


def test_nothing_of_ours_needs_what_only_some_systems_have():
    files = [path for room in ("lora_plugins", "integrations", "tasks") for path in (ROOT / room).rglob("*.py")]
    found = {(path, *each) for path in files for each in imported(ast.parse(path.read_text()))}
    some = {(path.name, name, is_guarded) for path, name, is_guarded in found if name in MISSING_ON_WINDOWS}
    assert some == {("html_report.py", "resource", True), ("full_disk.py", "resource", True)}
