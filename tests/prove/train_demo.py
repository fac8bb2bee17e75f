"""Proof rows of the demo: the job of docs/examples/train-brown.toml with as many tokens as sixty
seconds of one processor buy, what it has learnt beside plain PyTorch on the same tokens, and that
it is served.

Needs the Brown corpus, which is fetched once.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from torch.nn import functional

from tests.live.service import service
from tests.prove.row import Row
from tests.prove.train_speed import llama
from train.data.corpus import Corpus, open_corpus
from train.data.stream import SampleStream
from train.folder import RunFolder
from train.job import Job, read_job
from train.step import Trainer
from train.weights import build_model, read_start
from train.world import LocalWorld

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "train-brown.toml"
PROCESSOR_S = 60.0
TRIED_STEPS = 5
LIMIT_S = 1800.0
ANSWER_TOKENS = 24


def rows() -> Iterator[Row]:
    """Every row of this module, as it is measured."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        job = demo(Path(scratch), tokens_bought())
        started_s = time.monotonic()
        folder = train(job, Path(scratch) / "job.toml")
        took_s = time.monotonic() - started_s
        bits = folder.status().bits_per_byte
        assert bits is not None
        yield learnt(job, bits, took_s)
        theirs = plain_bits(job, open_corpus(folder.corpus))
        gap = bits / theirs - 1
        measured = f"{gap:+.2%} ({bits:.3f} and {theirs:.3f} bits/byte)"
        yield Row("the demo beside plain PyTorch", "within 3 %", measured, abs(gap) <= 0.03)
        yield served(folder)


def tokens_bought() -> int:
    """How many tokens PROCESSOR_S of one thread train, by trying TRIED_STEPS steps."""
    job = Job()
    text = torch.randint(0, 256, (100_000,)).numpy().astype("uint16")
    trainer = Trainer(job, build_model(job, read_start(job)), SampleStream(text, 256, 0))
    trainer.step(LocalWorld())
    started_s = time.process_time()
    for _ in range(TRIED_STEPS):
        trainer.step(LocalWorld())
    step_s = (time.process_time() - started_s) / TRIED_STEPS
    return int(PROCESSOR_S / step_s) * job.run.batch_tokens


def demo(scratch: Path, tokens: int) -> Job:
    """Writes the example with so many tokens as a job in `scratch`."""
    text = EXAMPLE.read_text().replace("2_000_000", str(tokens)).replace("../../runs", ".")
    (scratch / "job.toml").write_text(text)
    return read_job(scratch / "job.toml")


def train(job: Job, file: Path) -> RunFolder:
    """Runs the command as a person does, to its end."""
    code = "import sys; from cluster.cli import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    return RunFolder(job.path)


def learnt(job: Job, bits: float, took_s: float) -> Row:
    """What held-out text costs."""
    model = build_model(job, read_start(job))
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    measured = f"{bits:.3f} ({job.run.tokens:,} tokens, {millions:.2f}M parameters, "
    measured += f"{took_s:.0f} s on {job.workers.count} workers)"
    check = f"bits/byte of held-out Brown after {PROCESSOR_S:.0f} processor-seconds' tokens"
    return Row(check, "<= 3.7, <= 3M parameters", measured, bits <= 3.7 and millions <= 3)


def plain_bits(job: Job, corpus: Corpus) -> float:
    """Bits per byte of transformers' Llama, from the same first weights, trained on the same tokens
    by a plain loop: one process, float32 weights under autocast, torch's AdamW, whole batches."""
    model = llama()
    model.load_state_dict(build_model(job, read_start(job)).state_dict())
    stream = SampleStream(corpus.train, job.data.sequence_tokens, job.run.seed)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ],
        lr=job.optimizer.learning_rate,
        betas=(0.9, 0.95),
    )
    warmup = round(0.05 * job.steps)
    for step in range(job.steps):
        done = (step + 1 - warmup) / (job.steps - warmup)
        falling = 0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2
        for group in optimizer.param_groups:
            rising = (step + 1) / warmup if step < warmup else falling
            group["lr"] = job.optimizer.learning_rate * rising
        batch = stream.batch(step * job.batch_samples, job.batch_samples)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1]).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()
    return held_out_bits(job, model, corpus)


@torch.no_grad()
def held_out_bits(job: Job, model: Any, corpus: Corpus) -> float:
    """In float32, over the same first tokens of the held-out text."""
    length, nats, tokens = job.data.sequence_tokens, 0.0, 0
    for start in range(0, job.report.evaluate_tokens, length):
        row = torch.from_numpy(corpus.held_out[start : start + length + 1].astype("int64"))
        logits = model(row[None, :-1]).logits[0]
        nats += float(functional.cross_entropy(logits, row[1:], reduction="sum"))
        tokens += length
    per_byte = (len(corpus.held_out) - 1) / corpus.held_out_bytes
    return nats / tokens / math.log(2) * per_byte


def served(folder: RunFolder) -> Row:
    """`sanderling up --model <run>` completes a text, and answers a chat, as transformers does with
    the run's folder."""
    from transformers import AutoModelForCausalLM

    prompt = "The President of the United "
    model = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)
    expected = (continued(model, prompt), continued(model, f"{prompt}\n"))
    body = {"model": folder.path.name, "max_tokens": ANSWER_TOKENS, "temperature": 0}
    chat = {"messages": [{"role": "user", "content": prompt}]}
    with service(f"model={folder.path}", "prefill.replicas=0") as live:
        url = f"{live.url}/v1"
        text = httpx.post(f"{url}/completions", json=body | {"prompt": prompt}, timeout=120)
        answer = httpx.post(f"{url}/chat/completions", json=body | chat, timeout=120)
    found = (
        text.raise_for_status().json()["choices"][0]["text"],
        answer.raise_for_status().json()["choices"][0]["message"]["content"],
    )
    check = "the run's folder is served: a completion and a chat"
    return Row(check, repr(expected), repr(found), found == expected)


def continued(model: Any, prompt: str) -> str:
    """The likeliest bytes after a prompt, by transformers."""
    ids = torch.tensor([list(prompt.encode())])
    made = model.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :]
    return bytes(made.tolist()).decode()
