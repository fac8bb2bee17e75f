"""`python -m tests.peers.inprocess.run_vllm FOLDER`: vLLM's engine in this process, with bfloat16
weights from FOLDER. Called by tests/peers/inprocess/contenders.py, in vLLM's environment.

Its own loop is timed from the step after which every sequence has a token; detokenizing is off, and
so is its prefix cache. A step may hold all prompts of a cell at once.
"""

import itertools
import sys
from importlib import import_module
from typing import Any

from tests.peers.inprocess.protocol import Cell, Measure, serve, stepped

MOST_SEQUENCES = 32
STEP_TOKENS = 8192


def load(folder: str) -> tuple[str, Measure]:
    """`vllm.LLM`, of which only the engine is used."""
    vllm: Any = import_module("vllm")
    llm = vllm.LLM(
        model=folder,
        dtype="bfloat16",
        max_model_len=2048,
        max_num_seqs=MOST_SEQUENCES,
        max_num_batched_tokens=STEP_TOKENS,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    engine = llm.llm_engine
    names = itertools.count()

    def measure(cell: Cell) -> dict[str, float]:
        new = max(cell.new_tokens, 1)
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        places = {}
        for place, prompt in enumerate(cell.prompts()):
            name = f"{next(names)}"
            places[name] = place
            engine.add_request(name, {"prompt_token_ids": prompt}, params)

        def step(counts: list[int]) -> bool:
            if not engine.has_unfinished_requests():
                return False
            for output in engine.step():
                counts[places[output.request_id]] = len(output.outputs[0].token_ids)
            return True

        return {"engine": stepped(cell, step)}

    return str(vllm.__version__), measure


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1]))
