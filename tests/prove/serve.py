"""`make prove-serve`: everything the first slice promises, measured, in one table.

python -m tests.prove.serve                     all of it, about an hour
python -m tests.prove.serve --only kv,models    some modules
python -m tests.prove.serve --json rows.json    the rows for another program, too
"""

import sys

from tests.prove.table import main

# Cheap ones first; what needs a fresh clone last.
MODULES = ("house", "kv", "engine", "models", "disaggregation", "client", "faults", "install")

if __name__ == "__main__":
    sys.exit(main("prove-serve", MODULES))
