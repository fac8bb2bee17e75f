"""`python -m tests.peers.inprocess.run_transformers FOLDER DTYPE`: `generate` of transformers over
a static batch. Called by tests/peers/inprocess/contenders.py.

Timed by a stopping criterion that never stops anything: it is called after every token.
"""

import sys
import time
from typing import Any

import torch

from tests.peers.inprocess.protocol import THREADS, Cell, Mark, Measure, decode_rate, serve


def load(folder: str, dtype: str) -> tuple[str, Measure]:
    """The model of a Hugging Face folder."""
    import transformers

    torch.set_num_threads(THREADS)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).eval()

    def measure(cell: Cell) -> dict[str, float]:
        marks: list[Mark] = []

        def look(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            made = ids.shape[1] - cell.prompt_tokens
            marks.append(Mark(time.perf_counter(), (made,) * cell.batch))
            return torch.zeros(len(ids), dtype=torch.bool)

        ids = torch.tensor(cell.prompts())
        started_s = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max(cell.new_tokens, 1),
                do_sample=False,
                stopping_criteria=transformers.StoppingCriteriaList([look]),
                pad_token_id=0,
            )
        if cell.new_tokens:
            return {"generate": decode_rate(marks, cell.new_tokens)}
        return {"generate": ids.numel() / (marks[0].at_s - started_s)}

    return str(transformers.__version__), measure


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1], sys.argv[2]))
