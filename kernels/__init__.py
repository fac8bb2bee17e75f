"""How models are computed: one operation, one file per implementation folder.

`reference/` is plain torch and the yardstick for every faster implementation. The modules next
to this file (`formats`, `rope`) describe data and import no torch, so loaders may read them.
"""

import os

# Asks torch's matrix library (MKL) for one order of additions, whatever the number of rows and of
# threads; see reference/stable.py. It reads this at its first product, so it is said here, before
# any of ours. A value that is already there stays.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
