"""The figures of tests/peers/sweeps.py as text, as JSON and as a picture. Called by
tests/prove/kernel_http.py."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.peers.sweeps import NEW_TOKENS, PROMPT_TOKENS, Taken


def text(taken: Taken) -> str:
    """A line for each load and server: tokens per second, and the first token's p90."""
    lines = [f"{'streams':>8}  {'server':24}{'tokens/s':>9}  {'first token p90, ms':>19}"]
    for streams in sorted(taken.streams):
        for name in taken.streams[streams]:
            first_ms = taken.first_p90_s(streams, name) * 1e3
            lines.append(
                f"{streams:>8}  {name:24}{taken.rate(streams, name):>9.1f}  {first_ms:>19.0f}"
            )
    lines += [f"{'seen':>8}  {name:24}{'':>9}  {_ms(taken, name):>19.1f}" for name in taken.seen]
    for length, servers in taken.contexts.items():
        for name, rounds in servers.items():
            one = rounds[0]
            lines.append(
                f"{length:>8}  {name:24}{one.decode:>9.1f}  prefill {one.prefill:.0f} tokens/s"
            )
    return "\n".join([*lines, *(f"{name}: {why}" for name, why in taken.failed.items())])


def _ms(taken: Taken, name: str) -> float:
    return taken.first_seen_s(name) * 1e3


def plain(taken: Taken) -> dict[str, object]:
    """Everything, for JSON."""
    return {
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "streams": _dicts(taken.streams),
        "contexts": _dicts(taken.contexts),
        "first_seen_s": taken.seen,
        "failed": taken.failed,
    }


def draw(taken: Taken, path: Path) -> None:
    """Write the PNG: throughput and first token by streams, decode and prefill by context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), dpi=120, layout="constrained")
    (left, right), (low_left, low_right) = figure.subplots(2, 2)
    streams = sorted(taken.streams)
    lengths = sorted(taken.contexts)
    names = list(dict.fromkeys(n for found in taken.streams.values() for n in found))
    load = f"{PROMPT_TOKENS} tokens of prompt, {NEW_TOKENS} of answer"
    _lines(left, names, streams, lambda s, n: taken.rate(s, n))
    left.set(title=f"output tokens/s, {load}", xlabel="streams")
    _lines(right, names, streams, lambda s, n: taken.first_p90_s(s, n))
    right.set(title=f"first token p90, seconds, {load}", xlabel="streams", yscale="log")
    _lines(low_left, names, lengths, lambda c, n: taken.contexts[c][n][0].decode)
    low_left.set(title="decode of one stream, tokens/s", xlabel="tokens of context")
    _lines(low_right, names, lengths, lambda c, n: taken.contexts[c][n][0].prefill)
    low_right.set(title="prefill of one prompt, tokens/s", xlabel="tokens of prompt")
    for axes, places in ((left, streams), (right, streams), (low_left, lengths)):
        _ticks(axes, places)
    _ticks(low_right, lengths)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(names))
    figure.suptitle("SmolLM2-135M over HTTP, 2 threads each", size=11)
    figure.savefig(path)


def _lines(
    axes: Any, names: Iterable[str], places: list[int], value: Callable[[int, str], float]
) -> None:
    for number, name in enumerate(names):
        found = []
        for place in places:
            try:
                found.append((place, value(place, name)))
            except KeyError:  # this server was not asked that, or failed
                continue
        if not found:
            continue
        style = "o-" if name.startswith("sanderling") else "s--"
        axes.plot(*zip(*found, strict=True), style, label=name, color=f"C{number}", markersize=4)


def _ticks(axes: Any, places: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [f"{place}" for place in places])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def _dicts(loads: Any) -> dict[str, Any]:
    return {
        f"{load}": {name: [one._asdict() for one in rounds] for name, rounds in servers.items()}
        for load, servers in loads.items()
    }
