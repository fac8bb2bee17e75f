"""`make prove-helm`: the chart, the controller, and the providers it rents from, in one table.

python -m tests.prove.helm                    all of it
python -m tests.prove.helm --only helm_chart
"""

import sys

from tests.prove.table import main

MODULES = ("helm_chart", "helm_controller", "helm_aws")

if __name__ == "__main__":
    sys.exit(main("prove-helm", MODULES))
