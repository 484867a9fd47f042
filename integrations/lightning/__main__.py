"""`python -m lora_plugins.integrations.lightning`: the command line, as `python -m lora_plugins` is."""

from lora_plugins.cli.main import main

raise SystemExit(main())
