"""`make prove-service`: the service under every parameter, fault and client, in one table.

python -m tests.prove.service                    all of it, about two hours
python -m tests.prove.service --only kills       some modules
python -m tests.prove.service --json rows.json   the rows for another program, too
"""

import sys

from tests.prove.table import main

# The suites first, what kills last.
MODULES = (
    *("suites", "oracles", "tenants", "clients", "threshold", "overhead", "peers"),
    *("nodes", "kills", "soak"),
)

if __name__ == "__main__":
    sys.exit(main("prove-service", MODULES))
