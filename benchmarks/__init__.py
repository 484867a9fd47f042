"""Measurements of lora_plugins that anyone can repeat; run them from the top of the repository."""
