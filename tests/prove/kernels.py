"""`make prove-kernels`: what the CPU kernels are held to, in one table.

python -m tests.prove.kernels                    all of it, about ten minutes
python -m tests.prove.kernels --only kernel_linears

Not in here yet: the comparison with other engines in process and over HTTP, Triton, integer-only
kernels.
"""

import sys

from tests.prove.table import main

MODULES = ("kernel_linears", "kernel_suites", "kernel_quality", "kernel_memory")

if __name__ == "__main__":
    sys.exit(main("prove-kernels", MODULES))
