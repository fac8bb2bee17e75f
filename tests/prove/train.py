"""`make prove-train`: training, what it learns, how fast, and what it survives, in one table.

python -m tests.prove.train                     all of it
python -m tests.prove.train --only train_demo   some modules
"""

import sys

from tests.prove.table import main

MODULES = (
    "train_demo",
    "train_speed",
    "train_checkpoint",
    "train_pipeline",
    "train_kill",
    "train_shared",
)

if __name__ == "__main__":
    sys.exit(main("prove-train", MODULES))
