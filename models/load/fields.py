"""Checked access to foreign metadata: the right type, in range, or a sentence about it.

Both loaders read configurations through this, so that a wrong value is refused in the same words
wherever it comes from. Imports nothing heavy.
"""

import math
from collections.abc import Mapping
from typing import Any


class Fields:
    """A mapping from a file, with typed getters. Each raises ValueError naming file and key when
    the value is missing (and no default is given) or of another type."""

    def __init__(self, source: str, values: Mapping[str, Any]) -> None:
        self.source, self.values = source, values

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def refuse(self, key: str, wanted: str) -> ValueError:
        """The error for a value that is not `wanted`."""
        shown = repr(self.values.get(key))
        if len(shown) > 80:
            shown = shown[:77] + "..."
        return ValueError(f"{self.source}: {key} must be {wanted}, got {shown}.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number (a float with no fraction counts)."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.refuse(key, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.refuse(key, "a number")
        if isinstance(value, int) and abs(value) > 1 << 64 or not math.isfinite(value):
            raise self.refuse(key, "a finite number")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            raise self.refuse(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise self.refuse(key, "text")
        return value

    def items(self, key: str, kind: type) -> list[Any]:
        """A list whose entries are all of one type."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self.refuse(key, f"a list of {kind.__name__}")
        return value
