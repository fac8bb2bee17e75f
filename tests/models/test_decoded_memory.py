"""A replica that decodes the weights is no larger afterwards than one that maps them."""

import subprocess
import sys
import textwrap

PROGRAM = textwrap.dedent(
    """
    import re, sys, threading
    from pathlib import Path
    from models.load import load_model

    def load():
        model = load_model("smollm2-135m-instruct", cache_dir=Path(sys.argv[1]))
        text = Path("/proc/self/status").read_text()
        print(re.search(r"RssAnon:\\s+(\\d+) kB", text)[1])

    threading.Thread(target=load).start()  # where an actor's constructor runs
    """
)


def private_kib(cache: str) -> int:
    """Memory of a process of its own after it loaded the default model."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, cache], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_decoding_keeps_no_memory(tmp_path):
    decoding, mapping = (private_kib(str(tmp_path)) for _ in range(2))
    assert decoding < 1.5 * mapping, (decoding, mapping)
