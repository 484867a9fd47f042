"""What the project is called where names matter, without anything to import."""

DISTRIBUTION = "lora-plugins"
"""What pip calls it."""

MANIFEST = "adapter.json"
"""Name of the manifest in an adapter folder."""
