"""The commands under `bench`: measure the running service, the engine alone, or this machine.

Imported by the CLI when one of them is called.
"""

import json
from pathlib import Path
from typing import Any

import click
import httpx
from rich.console import Console

from cluster.options import Resolved, with_settings
from cluster.settings import Settings
from cluster.settings.losses import quality_cost
from serve.bench import Load, Slo, run, run_arrivals
from serve.commands import KEY, service_url, unwell
from serve.runfiles import RunFiles
from serve.view import bench_table

COUNT = click.IntRange(min=1)
SECONDS = click.FloatRange(min=0, min_open=True)
FILE = click.Path(path_type=Path, dir_okay=False)


@click.group()
def bench() -> None:
    """Measure a load: `serve` over HTTP, `engine` in this process; `kernels`: this machine;
    `profile`: the engine's steps, for `sanderling plan`."""


@bench.command("serve")
@click.option("--requests", type=COUNT, default=16, show_default=True, help="Requests in all.")
@click.option("--concurrency", type=COUNT, default=4, show_default=True, help="Requests at once.")
@click.option("--prompt-tokens", type=COUNT, default=64, show_default=True, help="Prompt length.")
@click.option("--max-tokens", type=COUNT, default=32, show_default=True, help="Answer length.")
@click.option("--rate", type=SECONDS, help="Poisson arrivals per second instead of a closed loop.")
@click.option("--trace", "trace_file", type=FILE, help="Arrivals and lengths from .csv or .jsonl.")
@click.option("--speed", type=SECONDS, default=1.0, show_default=True, help="Of the trace.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the Poisson arrivals.")
@click.option("--slo-first-s", type=SECONDS, default=None, help="Promised time to first token.")
@click.option("--slo-gap-s", type=SECONDS, default=None, help="Promised mean gap of tokens.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--plot", type=FILE, help="Also draw the latencies to this PNG.")
@KEY
@with_settings()
def bench_serve(
    resolved: Resolved, as_json: bool, plot: Path | None, key: str | None, **given: Any
) -> None:
    """Measure the running service: streamed completions, first token, gaps, goodput."""
    files = RunFiles(Path(resolved.settings.data_dir))
    if plot is not None:
        from serve.plot import refuse_without_library

        refuse_without_library()
    if files.settings.exists():
        _tell_cost(files.read_settings())
    try:
        report = send(service_url(files), key, given)
    except (httpx.HTTPError, RuntimeError) as error:
        raise click.ClickException(unwell(files, str(error) or type(error).__name__)) from error
    _show(report, as_json)
    if plot is not None:
        from serve.plot import draw

        draw(report, plot)


def send(url: str, key: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The load that the options describe. ValueError for options that exclude each other."""
    from serve.arrivals import poisson, trace

    rate, file = given["rate"], given["trace_file"]
    endless = float("inf")
    slo = Slo(given["slo_first_s"] or endless, given["slo_gap_s"] or endless)
    lengths = given["prompt_tokens"], given["max_tokens"]
    if rate is not None and file is not None:
        raise ValueError("--rate and --trace both say when requests arrive; give one of them")
    if file is not None:
        return run_arrivals(url, trace(file, given["requests"], given["speed"]), key, slo)
    if rate is not None:
        return run_arrivals(
            url, poisson(given["requests"], rate, *lengths, given["seed"]), key, slo
        )
    return run(url, Load(given["requests"], given["concurrency"], *lengths), key, slo)


@bench.command("engine")
@click.option("--streams", type=COUNT, default=4, show_default=True, help="Sequences at once.")
@click.option("--prompt-tokens", type=COUNT, default=64, show_default=True, help="Prompt length.")
@click.option("--max-tokens", type=COUNT, default=32, show_default=True, help="Answer length.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@with_settings("model")
def bench_engine(
    resolved: Resolved, streams: int, prompt_tokens: int, max_tokens: int, as_json: bool
) -> None:
    """Measure one engine in this process: no HTTP, no Ray, no hand-off."""
    from serve.bench_engine import run_engine

    load = Load(streams, streams, prompt_tokens, max_tokens)
    _tell_cost(resolved.settings)
    _show(run_engine(resolved.settings, load), as_json)


@bench.command("kernels")
@click.option(
    "--rounds", type=COUNT, default=5, show_default=True, help="Of all measures in turns."
)
@click.option(
    "--device", default="cpu", show_default=True, help="cpu, or cuda: the Triton kernels on a GPU."
)
@click.option("--only", multiple=True, help="On a GPU: one group of kernels; may be repeated.")
@click.option("--isa", default="auto", show_default=True, help="Instruction set; auto: the best.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--plot", type=FILE, help="Also draw them under both limits to this PNG.")
@with_settings("model")
def bench_kernels(
    resolved: Resolved,
    rounds: int,
    device: str,
    only: tuple[str, ...],
    isa: str,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure the CPU kernels on a model's matrices, against memory and arithmetic limits; or those
    of a GPU on matrices of Llama-3-8B, against torch and cuBLAS."""
    if device != "cpu":
        _bench_gpu(device, only, rounds)
        return
    import torch

    from kernels.cpu.bench import run as run_kernels
    from models.load import load_for_cpu
    from serve.view import kernels_table

    if plot is not None:
        from serve.plot import refuse_without_library

        refuse_without_library()
    model = load_for_cpu(resolved.settings.model)
    threads = resolved.settings.decode.threads or torch.get_num_threads()
    matrices = [*(weight for layer in model.layers for weight in layer.matrices), model.head]
    report = run_kernels(matrices, threads=threads, rounds=rounds, isa=isa)
    if as_json:
        figures = [figure._asdict() for figure in report.figures]
        limits = report.limits._asdict()
        click.echo(json.dumps({"threads": threads, **limits, "figures": figures}, indent=1))
    else:
        Console().print(kernels_table(report, threads))
    if plot is not None:
        from serve.plot import draw_kernels

        draw_kernels(report, matrices, plot)


@bench.command("profile")
@click.option("--rounds", type=COUNT, default=3, show_default=True, help="Of all cases in turns.")
@click.option("--kind", default="cpu", show_default=True, help="The kind's name in the catalogue.")
@click.option("--out", type=FILE, help="Write the table to this file instead of printing it.")
@with_settings("model")
def bench_profile(resolved: Resolved, rounds: int, kind: str, out: Path | None) -> None:
    """Measure steps of the engine on this machine, as a table that `sanderling plan` reads."""
    import datetime

    from serve.bench_profile import measure, to_toml

    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    table = to_toml(measure(resolved.settings, rounds), kind, datetime.date.today())
    if out is None:
        click.echo(table, nl=False)
    else:
        out.write_text(table, encoding="utf-8")
        click.echo(f"written to {out}")


def _tell_cost(settings: Settings) -> None:
    """What the speed that follows has cost; beside the report, which may be read by programs."""
    if cost := quality_cost(settings):
        click.echo(cost, err=True)


def _bench_gpu(device: str, only: tuple[str, ...], rounds: int) -> None:
    """As `python -m kernels.triton.bench`. A ClickException where there is no such GPU."""
    from models.device.place import open_device

    try:
        open_device(device)
    except ValueError as refusal:
        raise click.ClickException(str(refusal)) from None
    from kernels.triton.bench.__main__ import main

    groups = [word for group in only for word in ("--only", group)]
    raise SystemExit(main(["--device", device, "--rounds", str(rounds), *groups]))


def _show(report: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        Console().print(bench_table(report))
