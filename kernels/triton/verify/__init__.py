"""Checks of the kernels on machines without a GPU, in four layers.

A: `repair.py` makes Triton's interpreter round as GPUs do, so that results can be compared.
B: `guard.py` watches every access there: bounds, races between programs, undefined lanes.
C: `aot.py` compiles every case for every target and reads what came out.
D: `offsets.py` looks for products of 32 bits in addresses, `roofline.py` bounds what a case can do.
Importing this package imports no Triton. Run by tests/kernels/triton and from the command line.
"""
