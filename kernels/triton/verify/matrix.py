"""Layer C, the page: docs/kernels.md, a matrix of kernels and GPUs from the results of the sweep.

Called by `aot.py`, and by the test that holds the page up to date.
"""

from typing import Any

from kernels.triton.targets import TARGETS

HEAD = """# Triton kernels by GPU

Written by `python -m kernels.triton.verify.aot`; do not edit. Every kernel of `kernels/triton`
was compiled for every GPU of the catalogue on a machine without a GPU. What this page says is what
the compiled code says of itself: it is no measurement. Measured on one card each: [an
H100](kernels-h100.md), [an H200](kernels-h200.md).

An op ships on a GPU when all of its cases compile, keep their registers (nothing is spilled to
memory), fit into the card's shared memory, contain the matrix instruction that is expected, and
compute no address with a product of 32 bits.
"""


def markdown(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The whole page."""
    names = [each.name for each in TARGETS if each.name in results]
    parts = [HEAD, _cards(names), _ops(results, names), _refusals(results, names)]
    parts += [_faults(results, names), _cases(results, names)]
    return "\n".join(part for part in parts if part)


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _cards(names: list[str]) -> str:
    rows = [
        [
            each.name,
            ", ".join(card.name for card in each.cards),
            f"{each.shared_limit_bytes // 1024} KiB",
            str(each.warp_threads),
            "yes" if each.dot else "no",
            "yes" if each.fp8 else "no",
        ]
        for each in TARGETS
        if each.name in names
    ]
    header = ["target", "cards", "shared memory", "warp", "matrix units", "fp8 (e4m3fn)"]
    return "## GPUs\n\n" + _table(header, rows)


def _ops(results: dict[str, dict[str, dict[str, Any]]], names: list[str]) -> str:
    """Of each op, on each target: how many cases ship."""
    ops = sorted({case.split("/")[0] for target in names for case in results[target]})
    rows = [[op, *(_state(results[target], op) for target in names)] for op in ops]
    return "## Ops\n\nThe number of cases that ship.\n\n" + _table(["op", *names], rows)


def _state(entries: dict[str, dict[str, Any]], op: str) -> str:
    mine = [entry for case, entry in entries.items() if case.split("/")[0] == op]
    if not mine:
        return "not compiled"
    if any("refused" in entry for entry in mine):
        return "refused"
    bad = sum(bool(entry["faults"]) for entry in mine)
    return f"{len(mine) - bad} of {len(mine)}" if bad else f"ok ({len(mine)})"


def _refusals(results: dict[str, dict[str, dict[str, Any]]], names: list[str]) -> str:
    said: dict[tuple[str, str], list[str]] = {}
    for target in names:
        for op, entry in results[target].items():
            if "refused" in entry:
                said.setdefault((op, entry["refused"]), []).append(target)
    lines = [f"- {op} on {', '.join(on)}: {why}." for (op, why), on in sorted(said.items())]
    return "## Refused\n\n" + "\n".join(lines) + "\n" if lines else ""


def _faults(results: dict[str, dict[str, dict[str, Any]]], names: list[str]) -> str:
    lines = [
        f"- {case} on {target}: {'; '.join(entry['faults'])}."
        for target in names
        for case, entry in sorted(results[target].items())
        if entry.get("faults")
    ]
    return "## Faults\n\n" + "\n".join(lines) + "\n" if lines else ""


def _cases(results: dict[str, dict[str, dict[str, Any]]], names: list[str]) -> str:
    """Registers of a thread / KiB of shared memory of a program."""
    cases = sorted({case for target in names for case in results[target]})
    rows = [
        [case, *(_cell(results[target].get(case)) for target in names)]
        for case in cases
        if "/" in case
    ]
    text = "Registers of a thread / KiB of shared memory of a program, * with a matrix instruction."
    return f"## Cases\n\n{text}\n\n" + _table(["case", *names], rows)


def _cell(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    if entry["faults"]:
        return "fault"
    star = "*" if entry["matrix"] else ""
    return f"{entry['registers']} / {entry['shared_bytes'] / 1024:.3g}{star}"
