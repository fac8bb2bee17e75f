"""A replica that decodes the weights is no larger afterwards than one that maps them."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = textwrap.dedent(
    """
    import re, sys, threading
    from pathlib import Path
    from models.load import load_for_cpu, load_model

    def load():
        load = {"reference": load_model, "cpu": load_for_cpu}[sys.argv[2]]
        model = load("smollm2-135m-instruct", cache_dir=Path(sys.argv[1]))
        text = Path("/proc/self/status").read_text()
        print(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1])

    import torch

    thread = threading.Thread(target=load)  # where an actor's constructor runs
    thread.start()
    thread.join()
    """
)


def private_kib(cache: str, kernels: str) -> int:
    """Memory of a process of its own after it loaded the default model."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cache, kernels], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_decoding_or_packing_keeps_no_memory(tmp_path, kernels: str):
    decoding, mapping = (private_kib(str(tmp_path), kernels) for _ in range(2))
    assert decoding < 1.5 * mapping, (decoding, mapping)
