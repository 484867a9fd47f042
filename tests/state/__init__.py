"""An independent judge of `LoraModel`: a slow, plain reference, and random calls that both have to agree on."""
