"""The tags by which a machine is known again, and the times that are written into them.

A launch is made with the first three at once, so no machine of ours is ever without them.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

CLUSTER = "sanderling/cluster"  # whose machine it is
TOKEN = "sanderling/token"  # the launch that it answers to
OFFER = "sanderling/offer"
DOOMED = "sanderling/doomed"  # when EC2 takes it
REBALANCE = "sanderling/rebalance"  # since when EC2 holds it likely that it will
MOST_CHARS = 256  # of a tag's value


def tags(**values: str) -> list[dict[str, str]]:
    """As EC2 wants them, by the constants' names in small letters."""
    names = {"cluster": CLUSTER, "token": TOKEN, "offer": OFFER}
    return [{"Key": names[name], "Value": value} for name, value in values.items()]


def written(at_s: float) -> str:
    """A calendar time as a tag's value."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")


def read(text: str) -> float:
    """Seconds since 1970 of an ISO time. ValueError where it is none, or has no zone."""
    at = datetime.fromisoformat(text)
    if at.tzinfo is None:
        raise ValueError(f"{text!r} names no time zone; a time like {written(0)} is accepted")
    return at.timestamp()


def times(found: Mapping[str, str]) -> dict[str, float]:
    """Of a machine's tags, those that are times; what is no time is left out."""
    told = {}
    for key in (DOOMED, REBALANCE):
        try:
            told[key] = read(found[key])
        except (KeyError, ValueError):
            continue
    return told
