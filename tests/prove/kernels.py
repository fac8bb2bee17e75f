"""`make prove-kernels`: what the CPU kernels are held to, in one table.

python -m tests.prove.kernels                    all of it, about forty minutes
python -m tests.prove.kernels --only kernel_linears
"""

import sys

from tests.prove.table import main

MODULES = (
    "kernel_linears",
    "kernel_suites",
    "kernel_quality",
    "kernel_integer",
    "kernel_peers",
    "kernel_http",
)

if __name__ == "__main__":
    sys.exit(main("prove-kernels", MODULES))
