"""What a run shows: the plan, one line for its progress, and where everything is at its end.

Depends on `shims`.
"""

from lora_plugins.integrations.lightning.console.bar import followed
from lora_plugins.integrations.lightning.console.fit_console import FitConsole, tell_written
from lora_plugins.integrations.lightning.console.plan_table import plain_console, plain_metrics, print_lines, print_plan

__all__ = [
    "FitConsole",
    "followed",
    "plain_console",
    "plain_metrics",
    "print_lines",
    "print_plan",
    "tell_written",
]
