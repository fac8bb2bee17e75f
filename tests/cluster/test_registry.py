"""A registry imports on use and names what it knows."""

import sys

import pytest

from cluster.registry import Registry, load


def test_loads_on_use_only():
    sys.modules.pop("this", None)
    registry = Registry("poem", {"zen": "this:s", "decimal": "decimal:Decimal"})
    assert registry.names() == ["decimal", "zen"]
    assert "this" not in sys.modules
    assert registry.load("decimal")("1.5") == 1.5


def test_an_unknown_name_lists_the_known():
    registry = Registry("transport", {"b": "x:y", "a": "x:y"})
    with pytest.raises(ValueError, match=r"no transport is called 'tcp'; known: a, b"):
        registry.load("tcp")


def test_a_missing_attribute_is_a_bug_not_a_default():
    with pytest.raises(AttributeError):
        load("decimal:Nothing")
