"""`python -m lora_plugins`: the command line, which the integration with Lightning brings."""

from lora_plugins.integrations.lightning.main import main

raise SystemExit(main())
