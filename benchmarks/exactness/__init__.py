"""The exactness sweep: one model of every vision family, every layer adapted, checked in float64 against the law.

Run it from the top of the repository:

    python -m benchmarks.exactness --peer peft --output docs/exactness.md

With `--nf4` the base is stored in 4 bits, and has to do what the model of its dense values does.

`cases` says what a case is, `timm_cases`, `torchvision_cases`, `transformers_cases` and `diffusers_cases` list them,
`reference` computes the law without lora_plugins, `ours` and `peft_peer` hold the checks, `sweep` runs them and `table`
writes the result.
"""
