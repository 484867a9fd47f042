"""`lora-plugins train DATA`: from files on disk and a few flags to a configuration, which Lightning's `fit` then runs.

Everything here looks at files and names only; the libraries behind a run are imported when it begins.
"""

from lora_plugins.tasks.autoconfig.train import main as train_main

__all__ = ["train_main"]
