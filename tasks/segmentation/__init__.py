"""Semantic segmentation: the task and its data modules."""
