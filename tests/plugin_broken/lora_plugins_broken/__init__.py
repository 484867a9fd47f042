"""A plugin whose import fails, as one does whose own dependency is missing."""

raise ImportError("libquantum.so.7: cannot open shared object file")
