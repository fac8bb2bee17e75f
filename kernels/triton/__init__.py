"""Kernels in Triton, for CUDA and ROCm devices: one module for each module of `kernels/ops`.

A module holds `@triton.jit` kernels, launchers of the same names and arguments as the functions of
`kernels/reference`, and `cases`, which says what of it ships on a GPU (`case.py`, `targets.py`).
`verify/` checks all of it on machines without a GPU. Importing this package imports no Triton.
"""
