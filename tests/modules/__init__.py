"""LightningModules that others published, with and without the callback; `make test-modules` runs them."""
