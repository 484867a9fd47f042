"""The adapted LightningModule: its targets, adapters and tensors, and a merge that can be undone.

Depends on the core only.
"""
