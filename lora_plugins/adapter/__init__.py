"""Adapters on a model: putting them on and taking them off, and the state they leave the model in.

Data for inits that learn, mixed batches and combinations of adapters are here too.
"""
