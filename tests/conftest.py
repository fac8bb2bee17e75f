"""What every test shares: hypothesis without wall-time limits, for machines that are busy, and
Triton's interpreter where there is no GPU."""

import os
from pathlib import Path

from hypothesis import settings

settings.register_profile("house", deadline=None, print_blob=True)
settings.load_profile("house")

# Triton looks at this when it is imported, and here nothing has been imported yet. It changes
# nothing for who launches no kernel. With a GPU, kernels are to run on it.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
