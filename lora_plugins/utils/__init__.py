"""Small tools that know nothing of LoRA: lazy names, autocast, random numbers of one's own.

Every other room may use them.
"""
