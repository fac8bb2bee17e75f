"""Names -> lazily imported objects. A plug-in point is one Registry over a dict literal.

Entries are "module:attribute" strings, so that listing what exists imports nothing heavy.
"""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


def load(target: str) -> Any:
    """The object that "module:attribute" names; its module is imported now."""
    module, colon, attribute = target.partition(":")
    assert colon, f"{target!r} is not of the form module:attribute"
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Registry:
    """What exists of one kind. `kind` is the noun used in messages, as "transport"."""

    kind: str
    entries: Mapping[str, str]

    def names(self) -> list[str]:
        """Known names, sorted."""
        return sorted(self.entries)

    def load(self, name: str) -> Any:
        """The object called `name`. ValueError lists the known names when there is none."""
        if name not in self.entries:
            raise ValueError(f"no {self.kind} is called {name!r}; known: {', '.join(self.names())}")
        return load(self.entries[name])
