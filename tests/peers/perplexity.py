"""llama.cpp's perplexity of a text, by its own program, and ours on the same tokens.

llama-perplexity cuts a text into windows as serve.perplexity does, and scores the second half of
each: the tokens from window_tokens / 2 + 1 on.
"""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from serve.perplexity import Scored
from tests.prove import environments


def llama_perplexity(model: Path, text: str, count: int, window_tokens: int) -> float:
    """Of a .gguf file on the first `count` windows. RuntimeError where it says no figure."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text"
        file.write_text(text, encoding="utf-8")
        size = str(window_tokens)
        command = [str(environments.llama_cpp() / "llama-perplexity"), "-m", str(model)]
        command += ["-f", str(file), "-c", size, "-b", size, "--chunks", str(count)]
        command += ["-t", str(len(os.sched_getaffinity(0)))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    return read(done.stdout + done.stderr)


def read(said: str) -> float:
    """The figure at the end of what the program says."""
    found = re.search(r"Final estimate: PPL = (\d+\.\d+)", said)
    if found is None:
        raise RuntimeError(f"llama-perplexity says no figure: {said[-500:]}")
    return float(found[1])


def second_halves(scored: Scored, count: int, window_tokens: int) -> Scored:
    """Of windows in which every token but the first was scored, what llama-perplexity scores."""
    each, start = window_tokens - 1, window_tokens // 2
    assert len(scored.logprobs) == count * each
    places = [at for at in range(count * each) if at % each >= start]
    return Scored(
        tuple(scored.logprobs[at] for at in places), tuple(scored.likeliest[at] for at in places)
    )
