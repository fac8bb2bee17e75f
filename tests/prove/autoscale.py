"""`make prove-autoscale`: what buying and moving are held to, in one table.

python -m tests.prove.autoscale                    all of it
python -m tests.prove.autoscale --only loop
"""

import sys

from tests.prove.table import main

MODULES = ("spot", "loop", "migrate", "drill")

if __name__ == "__main__":
    sys.exit(main("prove-autoscale", MODULES))
