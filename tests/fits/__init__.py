"""Random fits of Lightning's Trainer, each done twice: with LoraCallback, and with A and B as plain parameters."""
