"""What a training step costs, side by side with its floor, full fine-tuning, PEFT and loralib.

    python -m benchmarks.speed --json cpu.json      # the table, whole: hours; a second call goes on where it stopped
    python -m benchmarks.speed.draw cpu.json        # the same as text, without measuring
    python -m benchmarks.speed --case vit --precision "bf16 autocast" --mode eager --dropout 0 --checkpointing no
    python -m benchmarks.speed --others             # also injection, loading, merging, inference and mixed batches
    python -m benchmarks.speed --growth growth.png  # also how the cost grows with rank, batch and depth

The floor is the same step with the base frozen and no adapter. In every variant the input requires a gradient, norms
are in eval mode, and a step is forward, loss and backward. A compiled variant is compared with the compiled floor.
Variants are measured in one process, one step of each in turn; a ratio is the median over the rounds of the ratio
within a round. Peers that are not installed are left out.
"""
