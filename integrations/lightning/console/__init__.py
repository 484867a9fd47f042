"""What a run shows: the plan, one line for its progress, and where everything is at its end.

Depends on `shims`.
"""

from lora_plugins.integrations.lightning.console.bar import is_terminal
from lora_plugins.integrations.lightning.console.fit_console import FitConsole, tell_written
from lora_plugins.integrations.lightning.console.plan_table import print_lines, print_plan

__all__ = ["FitConsole", "is_terminal", "print_lines", "print_plan", "tell_written"]
