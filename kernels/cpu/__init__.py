"""The kernels in C++, for CPUs: quantised weights, paged attention, a range of layers as one call.

`ops.py` is what callers use; `build.py` compiles `src/` when Sanderling is installed. Importing
this package loads nothing.
"""
