"""Our own adapter folder: a manifest and a safetensors file, written and read exactly.

Nothing is pickled, and nothing is half written.
"""
