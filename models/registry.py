"""Looks up one of several implementations by name and imports it only then.

A registry is a dict of "module:attribute" strings beside the implementations it lists.
"""

from collections.abc import Mapping
from importlib import import_module
from typing import Any


def lookup(kind: str, entries: Mapping[str, str], name: str) -> Any:
    """entries[name], imported. ValueError lists the known names when name is not among them."""
    if name not in entries:
        known = ", ".join(sorted(entries))
        raise ValueError(f"{kind} {name!r} is not known; accepted are {known}.")
    module, attribute = entries[name].split(":")
    return getattr(import_module(module), attribute)
