"""Two plugins that own what lora_plugins owns: an init by its name, and a layer type by its class."""
