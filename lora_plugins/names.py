"""What the project is called where names matter, without anything to import."""

DISTRIBUTION = "lora-plugins"
"""What pip calls it."""
