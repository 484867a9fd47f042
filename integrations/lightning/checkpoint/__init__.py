"""Small checkpoints: what Lightning writes, without the frozen base, and how it goes back onto the base."""
