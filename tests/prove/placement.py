"""`make prove-placement`: what to buy and where to put it, against published optima, exhaustive
search and independent checks, in one table.

python -m tests.prove.placement                          all of it
python -m tests.prove.placement --only placement_checks  some modules
"""

import sys

from tests.prove.table import main

MODULES = (
    "placement_checks",
    "placement_aggregate",
    "placement_spotserve",
    "placement_market",
    "placement_flow",
    "placement_pools",
)

if __name__ == "__main__":
    sys.exit(main("prove-placement", MODULES))
