"""The plan of an adapter: every decision about a model, made and checked before anything is touched.

The result is plain data.
"""
