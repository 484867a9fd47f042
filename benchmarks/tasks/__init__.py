"""Frozen backbone, LoRA at three ranks and full fine-tuning on real pictures with real weights."""
