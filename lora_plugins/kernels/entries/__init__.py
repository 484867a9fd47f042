"""Faster kernels that depend on one processor or on private names of torch; each file may be deleted or switched off.

A file defines `KERNELS`, whose name is the file's. Files do not import each other, and nothing outside imports them.
"""
