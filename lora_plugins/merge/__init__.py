"""Merging: updates written into the weights, for a while or for good.

What a merge loses to rounding is measured, and refused where it is too much.
"""
