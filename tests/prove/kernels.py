"""`make prove-kernels`: what the CPU kernels are held to, in one table.

python -m tests.prove.kernels                    all of it, about an hour and a half
python -m tests.prove.kernels --only kernel_linears
"""

import signal
import sys

from tests.prove.table import main

# Those that take the time first: they want the machine to themselves.
MODULES = (
    "kernel_linears",
    "kernel_peers",
    "kernel_http",
    "kernel_suites",
    "kernel_quality",
    "kernel_integer",
    "kernel_memory",
)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # engines and servers end with us
    sys.exit(main("prove-kernels", MODULES))
