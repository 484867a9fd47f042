"""An adapted layer in place: the user's own module, of a class that answers with the effective weight.

Normalization layers that stand still and weights that something else computes are here too.
"""
