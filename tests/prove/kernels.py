"""`make prove-kernels`: what the CPU kernels are held to, in one table.

python -m tests.prove.kernels                    all of it, about forty minutes
python -m tests.prove.kernels --only kernel_linears
"""

import signal
import sys

from tests.prove.table import main

MODULES = (
    "kernel_linears",
    "kernel_suites",
    "kernel_quality",
    "kernel_integer",
    "kernel_memory",
    "kernel_peers",
    "kernel_http",
)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines and servers end with us
    sys.exit(main("prove-kernels", MODULES))
