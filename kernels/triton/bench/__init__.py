"""Speed of the kernels on a GPU, as ratios against torch and the vendors' libraries.

Run as `python -m kernels.triton.bench`; needs torch and Triton, nothing else.
"""
