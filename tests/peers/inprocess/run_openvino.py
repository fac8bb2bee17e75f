"""`python -m tests.peers.inprocess.run_openvino GGUF`: OpenVINO GenAI on a .gguf file, by both of
its pipelines. Called by tests/peers/inprocess/contenders.py, in OpenVINO's environment.

LLMPipeline is timed by its own metrics and only takes one sequence; the batching pipeline is timed
step by step. No prefix cache; the rest is as they come.
"""

import itertools
import sys
from importlib import import_module
from typing import Any

from tests.peers.inprocess.protocol import THREADS, Cell, Measure, serve, stepped

CACHE_GIB = 1


def load(path: str) -> tuple[str, Measure]:
    """Both pipelines over one file."""
    genai: Any = import_module("openvino_genai")
    settings = {"INFERENCE_NUM_THREADS": THREADS}
    alone = genai.LLMPipeline(path, "CPU", scheduler_config=_scheduler(genai), **settings)
    batching = genai.ContinuousBatchingPipeline(path, _scheduler(genai), "CPU", settings)
    names = itertools.count()

    def measure(cell: Cell) -> dict[str, float]:
        figures = {"ContinuousBatchingPipeline": _batched(genai, batching, names, cell)}
        if cell.batch == 1:
            figures["LLMPipeline"] = _alone(genai, alone, cell)
        return figures

    return str(genai.__version__), measure


def _scheduler(genai: Any) -> Any:
    made = genai.SchedulerConfig()
    made.enable_prefix_caching = False
    made.cache_size = CACHE_GIB
    return made


def _config(genai: Any, cell: Cell) -> Any:
    made = genai.GenerationConfig()
    made.max_new_tokens = max(cell.new_tokens, 1)
    made.ignore_eos = True
    return made


def _alone(genai: Any, pipeline: Any, cell: Cell) -> float:
    numpy: Any = import_module("numpy")
    tensor = import_module("openvino").Tensor
    ids = numpy.array(cell.prompts(), dtype=numpy.int64)
    inputs = genai.TokenizedInputs(tensor(ids), tensor(numpy.ones_like(ids)))
    metrics = pipeline.generate(inputs, _config(genai, cell)).perf_metrics
    if cell.new_tokens:
        return 1e3 / float(metrics.get_tpot().mean)
    return cell.prompt_tokens * 1e3 / float(metrics.get_ttft().mean)


def _batched(genai: Any, pipeline: Any, names: "itertools.count[int]", cell: Cell) -> float:
    numpy: Any = import_module("numpy")
    tensor = import_module("openvino").Tensor
    config = _config(genai, cell)
    handles = [
        pipeline.add_request(next(names), tensor(numpy.array([prompt], numpy.int64)), config)
        for prompt in cell.prompts()
    ]

    def step(counts: list[int]) -> bool:
        if not pipeline.has_non_finished_requests():
            return False
        pipeline.step()
        for place, handle in enumerate(handles):
            while handle.can_read():
                counts[place] += sum(len(made.generated_ids) for made in handle.read().values())
        return True

    return stepped(cell, step)


if __name__ == "__main__":
    serve(lambda: load(sys.argv[1]))
