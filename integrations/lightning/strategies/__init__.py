"""Strategies of Lightning: which ones an adapter survives, and how checkpoints pass through them."""
