"""The command: runs the rows of the groups asked for, prints a table, writes JSON.

python -m kernels.triton.bench --json gpu.json
python -m kernels.triton.bench --only linear --only paged --rounds 3
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.triton.bench import attention, linear, rows
from kernels.triton.bench.measure import Row, Timing, copy_bandwidth, host_s, measure
from kernels.triton.launch import target_of
from kernels.triton.norm import rms_norm

GROUPS: dict[str, Callable[[torch.device], Iterator[Row]]] = {
    "rowwise": rows.rowwise_rows,
    "prefill": attention.prompt_rows,
    "paged": attention.paged_rows,
    "grouped": rows.expert_rows,
    "sgmv": rows.adapter_rows,
    "linear": linear.rows,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 1 where there is no GPU; 2 where no row could be measured. arguments: the command's own
    when None."""
    asked = _arguments(arguments)
    if not torch.cuda.is_available():
        print("There is no GPU: torch.cuda.is_available() is false.", file=sys.stderr)
        return 1
    device = torch.device(asked.device)
    begun = time.perf_counter()
    report = _head(device)
    print(json.dumps(report))
    found: list[dict[str, Any]] = []
    for group in asked.only or GROUPS:
        for row in GROUPS[group](device):
            if time.perf_counter() - begun > asked.budget_s:
                print(f"{row.group:18} {row.case:32} skipped: no time is left")
                found.append({"group": row.group, "case": row.case, "skipped": True})
                continue
            done = _run(row, asked.rounds, report["copy_bytes_per_s"])
            found.append(done)
            print(_line(done), flush=True)
    report |= {"seconds": time.perf_counter() - begun, "rows": found}
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1), encoding="utf-8")
    print(f"{report['seconds']:.0f} s")
    return 0 if any(row.get("ours") for row in found) else 2


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", action="append", choices=list(GROUPS), help="may be repeated")
    parser.add_argument("--rounds", type=int, default=7, help="of all contenders in turns")
    parser.add_argument("--budget-s", type=float, default=140, help="no row starts after it")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def _head(device: torch.device) -> dict[str, Any]:
    import triton

    x = torch.randn(8, 4096, device=device, dtype=torch.bfloat16)
    return {
        "gpu": torch.cuda.get_device_name(device),
        "target": target_of("bench", x).name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_bytes_per_s": copy_bandwidth(device),
        "host_launch_s": host_s(lambda _: rms_norm(x, x[0], 1e-5)),
        "host_torch_s": host_s(lambda _: x + x),
    }


def _run(row: Row, rounds: int, bandwidth: float) -> dict[str, Any]:
    begun = time.perf_counter()
    done: dict[str, Any] = {"group": row.group, "case": row.case}
    try:
        timings = measure(row.make(), rounds)
    except Exception as failure:
        done["failure"] = f"{type(failure).__name__}: {str(failure)[:160]}"
        timings = []
    torch.cuda.empty_cache()
    done["ours"] = [_told(each, row, bandwidth) for each in timings if each.ours]
    done["peers"] = [_told(each, row, bandwidth) for each in timings if not each.ours]
    done["took_s"] = time.perf_counter() - begun
    return done


def _told(timing: Timing, row: Row, bandwidth: float) -> dict[str, Any]:
    told: dict[str, Any] = {"name": timing.name}
    if timing.failure:
        return told | {"failure": timing.failure}
    assert timing.seconds is not None
    told |= {"us": timing.seconds * 1e6, "captured": timing.captured, "error": timing.error}
    if row.moved_bytes:
        told["of_copy_bandwidth"] = row.moved_bytes / timing.seconds / bandwidth
    if row.operations:
        told["tera_operations_s"] = row.operations / timing.seconds / 1e12
    return told


def _line(done: dict[str, Any]) -> str:
    """us of everybody, and for ours the ratio to the fastest peer: above 1 it is faster."""
    head = f"{done['group']:18} {done['case']:32} "
    if "failure" in done:
        return head + "FAILED " + str(done["failure"])
    peers = [each for each in done["peers"] if "us" in each]
    best = min((each["us"] for each in peers), default=None)
    parts = []
    for each in [*done["ours"], *done["peers"]]:
        if "failure" in each:
            parts.append(f"{each['name']} FAILED {each['failure']}")
            continue
        text = f"{each['name']} {each['us']:.1f}us" + ("" if each["captured"] else "(eager)")
        if each in done["ours"] and best is not None:
            text += f" x{best / each['us']:.2f}"
        if each["error"] is not None:
            text += f" err {each['error']:.1e}"
        parts.append(text)
    share = done["ours"][0].get("of_copy_bandwidth") if done["ours"] else None
    return head + " | ".join(parts) + (f" | bw {share:.2f}" if share else "")


if __name__ == "__main__":
    sys.exit(main())
