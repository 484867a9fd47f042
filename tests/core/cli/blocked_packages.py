"""Runs the program in a process in which some packages cannot be imported."""

import subprocess
import sys


def without(packages, *calls, cwd=None):
    """Runs code in a process in which some packages cannot be imported, whether they are installed or not."""
    code = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {packages!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        "from lora_plugins.cli.main import main\n" + "\n".join(calls)
    )
    command = [sys.executable, "-W", "ignore:Failed to initialize NumPy", "-c", code]  # torch's, where it is missing
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
