"""The engine on a GPU, beside transformers on the same GPU: what it answers, and how fast.

    python -m tests.prove.gpu_engine MODEL.gguf --json gpu_engine.json

One process: our engine (no Ray, no HTTP) over the Triton kernels, the weights as quantised as the
file has them; and transformers' LlamaForCausalLM in the same dtype, of the same weights
dequantised. Every part is measured in turns, medians; a part that fails is reported and stops
nobody. Needs torch, triton, transformers and pydantic. `--device cpu` is a check of this file.
"""

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from models.batch import TokenBatch
from models.device.decoder import DeviceDecoder
from models.load import load_for_device, load_model, load_text
from models.load.gguf import read_config
from models.load.gguf_file import open_gguf
from serve.engine.cost import StepCost
from serve.engine.device_runner import DeviceRunner
from serve.engine.engine import Engine
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Limits, Request, Sampling, Sequence
from serve.kv.device import DeviceStorage
from serve.kv.pool import PagePool
from serve.kv.prefix import CacheKey, PrefixTree
from serve.kv.storage import KVShape
from tests.prove.gpu_peer import STREAM_PROMPT, STREAM_TOKENS, Theirs, some_ids

PROMPT = "The capital of France is"
ANSWER_TOKENS = 32
STREAMS = (1, 8, 32, 64, 128)
PREFILL_TOKENS, PREFILL_ROUNDS = 512, 9
LONG_PROMPTS = (512, 4096)
PAGE_TOKENS, KV_TOKENS = 16, 65_536
GREEDY, DRAWN = Sampling(temperature=0.0), Sampling(temperature=1.0, top_k=50, top_p=0.9, seed=1)


class _Silent:
    """No text is looked at while time is taken."""

    def push(self, ids: Any) -> str:
        return ""

    def flush(self) -> str:
        return ""


class Ours:
    """An engine over one decoder on a device, warmed up."""

    def __init__(self, decoder: DeviceDecoder, kv_format: str, streams: int) -> None:
        config = decoder.config
        shape = KVShape(
            config.layers, KV_TOKENS // PAGE_TOKENS, PAGE_TOKENS, config.kv_heads, config.head_dim
        )
        self.storage = DeviceStorage(shape, kv_format, decoder.device)
        pool = PagePool(shape.pages, PAGE_TOKENS, self.storage)
        budget = PREFILL_TOKENS
        self.runner = DeviceRunner(decoder, self.storage, budget_tokens=budget, max_running=streams)
        begun = time.perf_counter()
        self.runner.warm_up()
        self.warmed_s = time.perf_counter() - begun
        self.scheduler = Scheduler(
            pool, PrefixTree(pool), budget_tokens=budget, max_running=streams, cost=StepCost()
        )
        silent: Any = _Silent
        self.engine = Engine(self.scheduler, self.runner, eos_token_ids=(), detokenizer=silent)
        self.number = 0

    def add(self, prompt: list[int], most: int, sampling: Sampling = GREEDY) -> None:
        self.number += 1
        name = str(self.number)
        limits, key = Limits(most, ignore_eos=True), CacheKey(name, "", "")
        self.engine.add(Sequence(Request(name, tuple(prompt), sampling, limits, key)))

    def answer(self, prompt: list[int], most: int) -> list[int]:
        self.add(prompt, most)
        made: list[int] = []
        while self.engine.has_work:
            for output in self.engine.step():
                made += output.delta.token_ids
        self.engine.check()
        return made

    def decode_tokens_per_s(
        self, streams: int, vocab: int, sampling: Sampling = GREEDY
    ) -> dict[str, float]:
        """Of steps in which every stream makes a token."""
        for stream in range(streams):
            self.add(some_ids(STREAM_PROMPT, vocab, stream), STREAM_TOKENS, sampling)
        while any(not s.output for s in self.engine.sequences.values()):
            self.engine.step()
        taken, inside = [], []
        run = self.runner.run

        def timed(slices: Any) -> Any:
            begun = time.perf_counter()
            made = run(slices)
            inside.append(time.perf_counter() - begun)
            return made

        self.runner.run = timed  # type: ignore[method-assign]
        try:
            while len(self.engine.sequences) == streams:
                begun = time.perf_counter()
                self.engine.step()
                taken.append(time.perf_counter() - begun)
        finally:
            del self.runner.run
        while self.engine.has_work:
            self.engine.step()
        self.engine.check()
        step_s = statistics.median(taken)
        return {
            "tokens_per_s": streams / step_s,
            "step_ms": step_s * 1e3,
            "launching_ms": statistics.median(inside) * 1e3,
        }

    def first_token_s(self, seed: int, vocab: int, tokens: int) -> float:
        """Of a prompt of which nothing is cached."""
        self.add(some_ids(tokens, vocab, seed), 1)
        begun = time.perf_counter()
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - begun


class Report:
    """What was found, printed as it comes."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def part(self, name: str, measure: Callable[[], Any]) -> None:
        begun = time.perf_counter()
        try:
            value = measure()
        except Exception as failure:
            value = {"failure": f"{type(failure).__name__}: {failure}"}
            traceback.print_exc()
        self.found[name] = value
        print(f"{name}: {json.dumps(value)} [{time.perf_counter() - begun:.1f} s]", flush=True)


def main() -> int:
    asked = _arguments()
    if asked.device != "cpu" and not torch.cuda.is_available():
        print("There is no GPU: torch.cuda.is_available() is false.", file=sys.stderr)
        return 1
    report, config = Report(), read_config(open_gguf(asked.model))
    tokenizer = load_text(str(asked.model)).tokenizer
    prompt = tokenizer.encode(PROMPT)
    path, dtype = str(asked.model), asked.dtype
    decoder = load_for_device(path, asked.device, dtype)
    ours = Ours(decoder, asked.kv_dtype or dtype, max(STREAMS))
    report.part(
        "warm-up", lambda: {"seconds": ours.warmed_s, "rows": list(ours.runner.padded.sizes)}
    )
    late: list[str] = []
    with _watched(late, asked.device):
        answered = ours.answer(prompt, ANSWER_TOKENS)
        report.part("answer", lambda: tokenizer.decode(answered))
        theirs = Theirs(asked.model, config, asked.device, getattr(torch, dtype))
        report.part("agreement", lambda: agreement(ours, theirs, prompt))
        for streams in asked.streams or STREAMS:
            report.part(f"decode, {streams} streams", lambda s=streams: decoding(ours, theirs, s))  # type: ignore[misc]
        report.part("64 streams, drawn", lambda: ours.decode_tokens_per_s(64, config.vocab, DRAWN))
        for tokens in LONG_PROMPTS:
            report.part(f"prefill of {tokens}", lambda n=tokens: prefilling(ours, theirs, n))  # type: ignore[misc]
        if asked.device != "cpu":
            report.part("captured steps, us", lambda: replayed(ours))
    report.part("compiled after warm-up", lambda: sorted(set(late)))
    report.part("float32 beside the CPU", lambda: exactly(path, asked.device, prompt))
    if asked.json:
        asked.json.write_text(json.dumps(report.found, indent=1), encoding="utf-8")
    return int(
        any("failure" in v for v in report.found.values() if isinstance(v, dict)) or bool(late)
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-dtype", default="", help="of the cache; the dtype if not given")
    parser.add_argument("--streams", type=int, action="append")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


@contextmanager
def _watched(late: list[str], device: str) -> Iterator[None]:
    """Within it, the names of kernels that are compiled are put into `late`."""
    if device == "cpu":
        watch: Any = nullcontext()
    else:
        from kernels.triton.warm import late as watching

        watch = watching(late.append)
    with watch:
        yield


def agreement(ours: Ours, theirs: Theirs, prompt: list[int]) -> dict[str, Any]:
    """Greedy tokens of both; and how far from theirs our choices are where they differ, with the
    same tokens before: in logits, whose differences rounding makes."""
    mine, other = ours.answer(prompt, ANSWER_TOKENS), theirs.answer(prompt, ANSWER_TOKENS)
    logits = theirs.logits([*prompt, *mine])[len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(mine, device=logits.device)[:, None])[:, 0]
    behind = logits.max(1).values - chosen
    common = next(
        (n for n, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b), len(mine)
    )
    return {
        "tokens": len(mine),
        "equal_from_the_start": common,
        "equal_step_by_step": int((behind == 0).sum()),
        "largest_distance_logits": float(behind.max()),
    }


def decoding(ours: Ours, theirs: Theirs, streams: int) -> dict[str, Any]:
    """Both twice, in turns; the better of each."""
    vocab = ours.runner.decoder.config.vocab
    rounds = [
        (ours.decode_tokens_per_s(streams, vocab), theirs.decode_tokens_per_s(streams, vocab))
        for _ in range(2)
    ]
    mine = max((one for one, _ in rounds), key=lambda each: each["tokens_per_s"])
    other = max((two for _, two in rounds), key=lambda each: each["tokens_per_s"])
    return {"ours": mine, "theirs": other, "ratio": mine["tokens_per_s"] / other["tokens_per_s"]}


def replayed(ours: Ours) -> dict[str, float]:
    """Microseconds of the GPU for each captured step (rows, parts of contexts, keys of chunks) of
    nobody's rows, and for logits of so many: without attention, which has nothing to read."""
    padded, found = ours.runner.padded, {}
    runs = {" ".join(map(str, shape)): run for shape, run in padded._steps.items()}
    runs |= {f"{rows} logits": run for rows, run in padded._heads.items()}
    for name, run in runs.items():
        taken = []
        for _ in range(7):
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            run()
            ended.record()
            ended.synchronize()
            taken.append(begun.elapsed_time(ended) * 1e3)
        found[name] = round(statistics.median(taken), 1)
    return found


def prefilling(ours: Ours, theirs: Theirs, tokens: int) -> dict[str, Any]:
    vocab = ours.runner.decoder.config.vocab
    mine, other = [], []
    for seed in range(PREFILL_ROUNDS + 2):
        mine.append(ours.first_token_s(1000 + seed, vocab, tokens))
        other.append(theirs.first_token_s(1000 + seed, vocab, tokens))
    ours_s, theirs_s = statistics.median(mine[2:]), statistics.median(other[2:])
    return {"ours_ms": ours_s * 1e3, "theirs_ms": theirs_s * 1e3, "ratio": theirs_s / ours_s}


def exactly(path: str, device: str, prompt: list[int]) -> dict[str, Any]:
    """Greedy tokens in float32 are those of the float32 decoder on the CPU, over the same file."""
    ours = Ours(load_for_device(path, device, "float32"), "float32", 1)
    answered = ours.answer(prompt, ANSWER_TOKENS)
    decoder = load_model(path)
    tokens = [*prompt, *answered]
    every = torch.arange(len(tokens))
    table = torch.arange(-(-len(tokens) // PAGE_TOKENS))[None]
    batch = TokenBatch(
        torch.tensor(tokens), every, every, (0, len(tokens)), (len(tokens),), table, every
    )
    config = decoder.config
    kv = torch.zeros(
        config.layers, 2, table.shape[1], PAGE_TOKENS, config.kv_heads, config.head_dim
    )
    with torch.inference_mode():
        wanted = decoder(batch, kv)[len(prompt) - 1 : -1].argmax(1).tolist()
    return {"tokens": len(answered), "equal": sum(map(int.__eq__, answered, wanted))}


if __name__ == "__main__":
    sys.exit(main())
