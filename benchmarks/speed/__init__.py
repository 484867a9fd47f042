"""What a training step costs, side by side with its floor, full fine-tuning, PEFT and loralib.

    python -m benchmarks.speed                      # the table
    python -m benchmarks.speed --others             # also injection, loading, merging, inference and mixed batches
    python -m benchmarks.speed --growth growth.png  # also how the cost grows with rank, batch and depth

The floor is the same step with the base frozen and no adapter. In every variant the input requires a gradient, norms
are in eval mode, and a step is forward, loss and backward. Variants are measured in one process, one step of each in
turn; a ratio is the median over the rounds of the ratio within a round. Peers that are not installed are left out.
"""
