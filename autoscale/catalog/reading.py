"""TOML files into frozen models: `cluster/reading.py`, by the name that the catalog knows it by."""

from cluster.reading import Strict, read_toml, validated

__all__ = ["Strict", "read_toml", "validated"]
