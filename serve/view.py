"""What `sanderling status` and `sanderling bench` print: tables from plain values."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from rich.table import Table

if TYPE_CHECKING:  # it imports torch
    from kernels.cpu.bench import Report

MIB = 1 << 20


def status_tables(status: dict[str, Any], data_dir: Path) -> list[Table]:
    """Replicas, then the memory of every process of the service."""
    return [replica_table(status), memory_table(data_dir)]


def replica_table(status: dict[str, Any]) -> Table:
    """One row per replica, from GET /status."""
    table = Table(title=f"{status['requests']} requests open{_went_on(status)}")
    for name in (
        "replica",
        "phase",
        "running",
        "waiting",
        "KV pages",
        "prefix hits",
        "KV received",
    ):
        table.add_column(name, justify="left" if name in ("replica", "phase") else "right")
    for entry in status["replicas"]:
        state = entry["state"]
        if state is None:
            table.add_row(entry["replica_id"], entry["phase"])
            continue
        stats = state["stats"]
        busy = stats["pages"] - stats["free_pages"] - stats["evictable_pages"]
        asked, hits = stats["prefix_queries_tokens"], stats["prefix_hits_tokens"]
        table.add_row(
            entry["replica_id"],
            entry["phase"],
            str(stats["running"]),
            str(stats["waiting"] + stats["reserved"]),
            f"{busy} + {stats['evictable_pages']} cached of {stats['pages']}",
            f"{hits / asked:.0%} of {asked} tokens" if asked else "-",
            f"{_received_bytes(state) / MIB:.1f} MiB" if state["role"] == "decode" else "-",
        )
    return table


def _went_on(status: dict[str, Any]) -> str:
    """How requests went on when a replica went."""
    counted = status["metrics"]
    with_pages, again = (
        counted.get(f"migrated_{name}", 0.0) for name in ("requests", "recomputed_tokens")
    )
    return (
        f", {status['resumed']} resumed so far ({with_pages:.0f} from their KV, "
        f"{again:.0f} tokens computed again)"
    )


def _received_bytes(state: dict[str, Any]) -> int:
    return int(state["handed_bytes"] + state["migrated"]["bytes"])


def kernels_table(report: "Report", threads: int) -> Table:
    """`sanderling bench kernels`: all linears of one step, and how near they come to a limit."""
    limits = report.limits
    title = f"{threads} threads: {limits.bytes_per_s / 1e9:.1f} GB/s read, "
    table = Table(title=title + f"{limits.products_per_s / 1e9:.0f} G products of bytes/s")
    for name in ("rows", "activations", "ms", "of bandwidth", "of peak"):
        table.add_column(name, justify="left" if name == "activations" else "right")
    for figure in report.figures:
        table.add_row(
            str(figure.m),
            figure.activations,
            f"{figure.seconds * 1e3:.2f}",
            f"{figure.of_bandwidth:.0%}",
            f"{figure.of_peak:.0%}",
        )
    return table


def memory_table(data_dir: Path) -> Table:
    """Proportional set size (shared pages divided among their users) of each process."""
    from cluster.raylocal.record import load_record
    from cluster.raylocal.sweep import session_processes

    record = load_record(data_dir)
    processes = session_processes(record) if record else []
    rows = sorted(((_pss_bytes(p), _label(p)) for p in processes), reverse=True)
    table = Table(title=f"memory: {sum(size for size, _ in rows) / MIB:.0f} MiB PSS in all")
    table.add_column("process")
    table.add_column("PSS MiB", justify="right")
    for size, label in rows:
        table.add_row(label, f"{size / MIB:.0f}")
    return table


def bench_table(report: dict[str, Any]) -> Table:
    """Latencies by quantile, with the throughput in the title."""
    load = report["load"]
    how = f"{load['concurrency']} at once" if "concurrency" in load else "by arrivals"
    good = ""
    if report["slo"] is not None:
        good = f", {report['within_slo']:.0%} within the promise ({report['goodput_per_s']:.2f}/s)"
    table = Table(
        title=f"{load['requests']} requests, {how}: "
        f"{report['output_tokens_per_s']:.1f} output tokens/s{good}"
    )
    table.add_column("seconds")
    for quantile in ("p50", "p90", "p99"):
        table.add_column(quantile, justify="right")
    for name in ("time_to_first_token_s", "inter_token_latency_s", "e2e_latency_s"):
        values = report[name]
        cells = [f"{values[q]:.3f}" if values else "-" for q in ("p50", "p90", "p99")]
        table.add_row(name.removesuffix("_s").replace("_", " "), *cells)
    return table


def _pss_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0


def _label(process: psutil.Process) -> str:
    """Ray names its workers after their actor; others are known by their program."""
    try:
        words = process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return "gone"
    first = " ".join(words[:1])
    if first.startswith("ray::"):
        return first.removeprefix("ray::")
    return " ".join(Path(word).name for word in words[:3])
