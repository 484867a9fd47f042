"""The door: what a plugin is, the hooks that it implements, and the registry of what is installed.

Layer types, inits and variants come through it, ours and other people's alike.
"""
