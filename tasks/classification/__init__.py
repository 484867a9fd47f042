"""Image classification: the task and its data modules."""
