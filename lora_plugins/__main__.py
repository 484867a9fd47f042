"""`python -m lora_plugins`: the command line."""

from lora_plugins.cli.main import main

raise SystemExit(main())
