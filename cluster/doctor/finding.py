"""What one check found."""

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """check: what was looked at; found: what is there; todo: what to do, empty when ok."""

    check: str
    state: State
    found: str
    todo: str = ""
