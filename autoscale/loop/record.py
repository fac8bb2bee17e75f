"""Signals and decisions as lines of JSON, one to a line, byte for byte the same whenever they are
equal."""

from pydantic import TypeAdapter

from autoscale.loop.actions import Decision
from autoscale.loop.signals import Signals

SIGNALS: TypeAdapter[Signals] = TypeAdapter(Signals)
DECISION: TypeAdapter[Decision] = TypeAdapter(Decision)


def signals_line(signals: Signals) -> bytes:
    """Without a line break. Equal signals give equal bytes."""
    return SIGNALS.dump_json(signals)


def decision_line(decision: Decision) -> bytes:
    """Without a line break. Equal decisions give equal bytes."""
    return DECISION.dump_json(decision)


def read_signals(line: bytes) -> Signals:
    """ValueError names what is wrong in the line."""
    return SIGNALS.validate_json(line)


def read_decision(line: bytes) -> Decision:
    """ValueError names what is wrong in the line."""
    return DECISION.validate_json(line)
