"""`make prove-service`: the service under every parameter, fault and client, in one table.

python -m tests.prove.service                    all of it, about an hour
python -m tests.prove.service --only kills       some modules
python -m tests.prove.service --json rows.json   the rows for another program, too
"""

import sys

from tests.prove.table import main

# The suites first, the kills last.
MODULES = ("suites", "oracles", "tenants", "overhead", "clients", "kills")

if __name__ == "__main__":
    sys.exit(main("prove-service", MODULES))
