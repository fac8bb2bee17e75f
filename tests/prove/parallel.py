"""`make prove-parallel`: what training sends, keeps and shares out, against each formula, in one
table.

python -m tests.prove.parallel                         all of it
python -m tests.prove.parallel --only parallel_comm    some modules
"""

import sys

from tests.prove.table import main

MODULES = (
    "parallel_zero",
    "parallel_comm",
    "parallel_memory",
    "parallel_mesh",
    "parallel_hetero",
)

if __name__ == "__main__":
    sys.exit(main("prove-parallel", MODULES))
