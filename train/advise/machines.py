"""What a job's workers can do: measured where they are this machine's, from data sheets where they
are named.

`--devices "2xa10g@1.01,4xt4@0.53"` are two machines, of two and of four accelerators, with $/h of
each; `"3xhere,1xhere*0.4"` are workers like this machine's and one of 0.4 of their speed.
"""

import re
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from cluster.registry import load
from train.advise.amp import DeviceKind, Links
from train.estimate import flops_per_token, peak_flops
from train.job import Job
from train.precision import COMPUTE
from train.weights import Start

# A name instead of an import: training does not depend on who plans purchases.
KINDS = "autoscale.catalog.kinds:read_kinds"
TERM = re.compile(r"(\d+)x([a-z0-9-]+)(?:\*([0-9.]+))?(?:@([0-9.]+))?", re.IGNORECASE)
HERE = "here"
OF_PEAK = 0.5
"""Share of a data sheet's products that training is taken to reach."""
PASS_S = 5e-3
"""Of starting the kernels of a micro-batch, on an accelerator."""
LATENCY_S = 5e-5
NETWORK_BYTES_PER_S = 1.25e9
"""Between machines, where nothing else is said: 10 Gbit/s."""
DISK_BYTES_PER_S = 1e9
"""Taken for granted, of a disk that state is read from and written to."""
COPY_BYTES = 1 << 26
MESSAGE_BYTES = 1 << 22
PRODUCT, PRODUCTS = 512, 8


@dataclass(frozen=True)
class Machines:
    """kinds: of which all have a speed against `pass_s`, seconds that so many samples take forward
    and backward on a device of speed 1; links; where each figure is from."""

    kinds: tuple[DeviceKind, ...]
    links: Links
    pass_s: Callable[[int], float]
    sources: tuple[str, ...]
    host_bytes_per_s: float
    disk_bytes_per_s: float = DISK_BYTES_PER_S

    @property
    def workers(self) -> int:
        """Devices in all."""
        return sum(kind.count for kind in self.kinds)

    @property
    def alike(self) -> bool:
        """Whether all devices have one speed."""
        return len({kind.speed for kind in self.kinds}) == 1

    @property
    def usd_per_h(self) -> float:
        """Of all devices."""
        return sum(kind.count * kind.usd_per_h for kind in self.kinds)


def machines_of(
    job: Job, start: Start, devices: str = "", network_bytes_per_s: float | None = None
) -> Machines:
    """Those of `--devices`, or the job's workers here. ValueError names the term that is wrong."""
    terms = parse_devices(devices) if devices else [(job.workers.count, HERE, 1.0, None)]
    network = network_bytes_per_s or NETWORK_BYTES_PER_S
    if all(name == HERE for _, name, _, _ in terms):
        return _here(job, start, terms, network_bytes_per_s)
    if any(name == HERE for _, name, _, _ in terms):
        raise ValueError(f"--devices {devices!r}: {HERE!r} does not go with kinds of a data sheet")
    return _from_sheets(job, start, terms, network)


Term = tuple[int, str, float, float | None]


def parse_devices(text: str) -> list[Term]:
    """Count, kind, speed, $/h of each term. ValueError for what is no term."""
    terms: list[Term] = []
    for part in text.split(","):
        found = TERM.fullmatch(part.strip())
        if found is None or int(found[1]) < 1 or (found[3] and float(found[3]) <= 0):
            raise ValueError(
                f"--devices: {part.strip()!r} is none of COUNTxKIND, COUNTxKIND*SPEED and "
                'COUNTxKIND@USD_PER_H, as in "2xa10g@1.01,4xt4@0.53"'
            )
        price = float(found[4]) if found[4] else None
        terms.append((int(found[1]), found[2].lower(), float(found[3] or 1.0), price))
    return terms


def _from_sheets(job: Job, start: Start, terms: Sequence[Term], network: float) -> Machines:
    if job.precision.compute == "float64":
        raise ValueError(
            'precision.compute = "float64": data sheets that are read here have 16-bit products; '
            '"float32" or "bfloat16" is accepted with --devices'
        )
    known = load(KINDS)()
    for _, name, _, _ in terms:
        if name not in known:
            raise ValueError(f"--devices: no kind is called {name!r}; known: {', '.join(known)}")
    rates = [_flops_per_s(known[name], job) * speed for _, name, speed, _ in terms]
    kinds = tuple(
        DeviceKind(
            name,
            count,
            rate / rates[0],
            known[name].memory_bytes,
            known[name].link_gb_per_s * 1e9,
            known[name].memory_gb_per_s * 1e9,
            job.budget.usd_per_worker_h if price is None else price,
        )
        for (count, name, _, price), rate in zip(terms, rates, strict=True)
    )
    sample = _sample_flops(job, start)
    sources = (
        f"data sheets of {', '.join(dict.fromkeys(kind.name for kind in kinds))}, {OF_PEAK:.0%} of "
        "their products, and for float32 a half, or an eighth where there are no TF32 units: "
        "nothing measured",
        f"network between machines {network / 1e9:.3g} GB/s, declared",
    )
    host = min(known[name].link_gb_per_s for _, name, _, _ in terms) * 1e9
    links = Links(network, LATENCY_S)
    return Machines(kinds, links, lambda n: PASS_S + n * sample / rates[0], sources, host)


def _flops_per_s(kind: Any, job: Job) -> float:
    rate = float(kind.bf16_tflops) * 1e12 * OF_PEAK
    if job.precision.compute == "float32":
        rate /= 2 if kind.sm is None or kind.sm >= 80 else 8
    return rate


def _sample_flops(job: Job, start: Start) -> float:
    """Of a sample forward and backward."""
    from train.model import Llama

    with torch.device("meta"):
        parameters = sum(p.numel() for p in Llama(start.config).parameters())
    length = job.data.sequence_tokens
    return length * flops_per_token(start.config, parameters, length)


def _here(
    job: Job, start: Start, terms: Sequence[Term], network_bytes_per_s: float | None
) -> Machines:
    """Workers share this machine's memory and its cores; how much that slows them is tried."""
    from train.advise.trial import Trial
    from train.local import threads_of

    workers = sum(count for count, _, _, _ in terms)
    crowd = crowding(workers)
    trial = Trial(job, start)
    memory = memory_bytes_per_s()
    link = network_bytes_per_s or socket_bytes_per_s()
    room = psutil.virtual_memory().available / workers
    usd = job.budget.usd_per_worker_h
    kinds = tuple(
        DeviceKind(HERE, n, speed, room, link, memory / workers, usd if price is None else price)
        for n, _, speed, price in terms
    )
    peak = peak_flops(COMPUTE[job.precision.compute])
    sources = (
        f"passes of the job's model, tried here on {threads_of(job)} threads ({peak / 1e9:.0f} "
        f"GFLOP/s at its best), x {crowd:.2f} for {workers} workers at once, tried with products",
        f"memory {memory / 1e9:.2g} GB/s, a connection {link / 1e9:.2g} GB/s, measured"
        if network_bytes_per_s is None
        else f"memory {memory / 1e9:.2g} GB/s measured, network {link / 1e9:.2g} GB/s declared",
        f"a disk {DISK_BYTES_PER_S / 1e9:.2g} GB/s, taken for granted",
    )
    links = Links(link, LATENCY_S)
    return Machines(kinds, links, lambda n: crowd * trial.pass_s(n), sources, memory)


def crowding(workers: int) -> float:
    """How much longer a product takes when all workers compute one at once."""
    a = torch.ones(PRODUCT, PRODUCT)

    def taken_s(_worker: int) -> float:
        started_s = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.mm(a, a)
        return time.perf_counter() - started_s

    taken_s(0)
    alone_s = min(taken_s(0) for _ in range(3))
    with ThreadPoolExecutor(workers) as pool:
        all_s = min(max(pool.map(taken_s, range(workers))) for _ in range(3))
    return max(1.0, all_s / alone_s)


def memory_bytes_per_s() -> float:
    """Bytes read and written per second by copying, at its best of three."""
    source = torch.ones(COPY_BYTES // 4)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(3):
        started_s = time.perf_counter()
        target.copy_(source)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * COPY_BYTES / best_s


def socket_bytes_per_s() -> float:
    """Of a message through a connection of this machine, at its best of five."""
    ours, theirs = socket.socketpair()
    payload, place = bytes(MESSAGE_BYTES), bytearray(MESSAGE_BYTES)
    best_s = float("inf")
    with ours, theirs:
        for _ in range(5):
            sender = threading.Thread(target=ours.sendall, args=(payload,))
            started_s = time.perf_counter()
            sender.start()
            view = memoryview(place)
            while view:
                view = view[theirs.recv_into(view) :]
            best_s = min(best_s, time.perf_counter() - started_s)
            sender.join()
    return MESSAGE_BYTES / best_s


def with_workers(job: Job, workers: int) -> Job:
    """The job on so many."""
    return job.model_copy(update={"workers": job.workers.model_copy(update={"count": workers})})
