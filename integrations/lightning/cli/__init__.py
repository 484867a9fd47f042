"""The commands of Lightning: `fit`, `validate`, `test`, `predict`, `plan`, `export` and `merge`."""
