"""A run for people: the progress line, the status table, the estimate, the loss plot."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from train.folder import RunFolder, Status
from train.job import Job

if TYPE_CHECKING:
    from train.estimate import Estimate

MIB = 1 << 20
BAR_WIDTH = 24
LINE_S = 10.0
"""Between two lines where the output is no terminal; a step is told of once."""


def duration(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def line(status: Status) -> str:
    """Where a run is, in one line."""
    words = [f"step {status.step}/{status.steps}", f"{status.tokens:,} tokens"]
    if status.loss is not None:
        words.append(f"loss {status.loss:.3f}")
    if status.bits_per_byte is not None:
        words.append(f"held out {status.bits_per_byte:.3f} bits/byte")
    if status.phase == "training" and status.tokens_per_s:
        words += [f"{status.tokens_per_s:,.0f} tokens/s", f"MFU {status.mfu:.1%}"]
        words.append(f"{duration(status.left_s or 0)} left")
    if status.usd:
        words.append(f"{status.usd:.4f} $")
    if status.sent_bytes and status.sent_bytes < status.dense_bytes:
        words.append(f"sent 1/{status.dense_bytes / status.sent_bytes:.1f} of dense")
    return ", ".join(words)


def sent(sent_bytes: float, dense_bytes: float) -> str:
    """What a worker sends a step, and how much less than uncompressed that is."""
    share = dense_bytes / sent_bytes
    return f"{sent_bytes / MIB:.3f} MiB per worker and step, 1/{share:.1f} of dense"


class Progress:
    """Shows a run's status as it changes: a bar in a terminal, now and then a line elsewhere."""

    def __init__(self, folder: RunFolder, console: Console) -> None:
        self.folder, self.console = folder, console
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._due_s, self._shown = 0.0, -1

    def __enter__(self) -> "Progress":
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def update(self, now_s: float) -> None:
        """Reads the status and shows it."""
        status = self.folder.status()
        if self.console.is_terminal:
            self._live.update(_bar(status))
        elif status.phase == "training" and now_s >= self._due_s and status.step != self._shown:
            self._due_s, self._shown = now_s + LINE_S, status.step
            self.console.print(line(status), highlight=False, soft_wrap=True)


def _bar(status: Status) -> Table:
    grid = Table.grid(padding=(0, 1))
    done = ProgressBar(total=max(status.steps, 1), completed=status.step, width=BAR_WIDTH)
    grid.add_row(done, Text(line(status) if status.phase == "training" else "starting workers"))
    return grid


def status_table(folder: RunFolder) -> Table:
    """Everything that is known of a run."""
    status = folder.status()
    table = Table("", str(folder.path), show_header=True)
    rows = {
        "phase": status.phase + (f" ({status.reason})" if status.reason else ""),
        "step": f"{status.step} of {status.steps}",
        "tokens": f"{status.tokens:,}",
        "loss": "-" if status.loss is None else f"{status.loss:.4f} nats/token",
        "held out": "-"
        if status.bits_per_byte is None
        else f"{status.bits_per_byte:.4f} bits/byte",
        "speed": f"{status.tokens_per_s:,.0f} tokens/s, MFU {status.mfu:.1%}",
        "workers": f"{status.workers}, generation {status.generation}",
        "trained": duration(status.trained_s) + (f", {status.usd:.4f} $" if status.usd else ""),
    }
    if status.sent_bytes:
        rows["communication"] = sent(status.sent_bytes, status.dense_bytes) + ", measured"
    if status.phase == "training" and status.left_s is not None:
        rows["left"] = duration(status.left_s)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def estimate_table(job: Job, found: "Estimate") -> Table:
    """What a job will take."""
    table = Table("", str(job.path), show_header=True)
    per_token = found.flops_per_token / 1e6
    workers = job.workers.count
    usd = found.hours * workers * job.budget.usd_per_worker_h
    rows = {
        "parameters": f"{found.parameters:,}",
        "weights, gradient, optimizer": f"{found.state_bytes / MIB:.1f} MiB per worker",
        "activations": f"{found.activation_bytes / MIB:.1f} MiB per worker",
        "computation": f"{per_token:.1f} MFLOP per token",
        "steps": f"{found.steps} of {job.run.batch_tokens} tokens on {workers} workers",
        "step": f"{found.step_s * 1e3:.0f} ms" if found.step_s < 10 else duration(found.step_s),
        "communication": _sent(job, found),
        "in all": duration(found.hours * 3600) + (f", {usd:.4f} $" if usd else ""),
        **found.memory,
    }
    if found.peak_bytes:
        rows["memory, measured"] = (
            f"{found.peak_bytes / MIB:.0f} MiB per worker at most, Python and torch included, "
            f"in a rehearsal of {found.rehearsed_steps} steps"
        )
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _sent(job: Job, found: "Estimate") -> str:
    if not found.sent_bytes:
        return "none: one worker" if job.workers.count == 1 else "by how the state is divided"
    told, late = sent(found.sent_bytes, found.dense_bytes), job.compression.given_steps
    if job.compression.kind == "none" or late == 0:
        return told
    return told + (f" after {late} steps of warm-up" if late else " once the variance is stable")


def plot(folder: RunFolder, path: Path) -> bool:
    """Draws the loss over tokens to a PNG; False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    from matplotlib.ticker import EngFormatter

    lines = folder.read_metrics()
    trained = [entry for entry in lines if "loss" in entry]
    held_out = [entry for entry in lines if "bits_per_byte" in entry]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot([entry["tokens"] for entry in trained], [entry["loss"] for entry in trained])
    axes.set(title=folder.path.name, xlabel="tokens", ylabel="nats per token, each step")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    if held_out:
        _draw_held_out(axes.twinx(), held_out)
    figure.savefig(path)
    return True


def _draw_held_out(axes: Any, held_out: list[dict[str, Any]]) -> None:
    bits = [entry["bits_per_byte"] for entry in held_out]
    axes.plot([entry["tokens"] for entry in held_out], bits, "o--", color="tab:orange")
    axes.set_ylabel("bits per byte, held out", color="tab:orange")
    axes.margins(y=0.25)
    for entry in (held_out[0], held_out[-1]):
        place = (entry["tokens"], entry["bits_per_byte"])
        side = "right" if entry["tokens"] else "left"
        axes.annotate(
            f"{place[1]:.3f}",
            place,
            (0, 8),
            textcoords="offset points",
            ha=side,
            color="tab:orange",
        )


def console_of_nobody() -> Console:
    """A console that shows nothing, for whoever calls where a person is not."""
    return Console(quiet=True)
