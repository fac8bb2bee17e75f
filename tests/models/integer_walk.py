"""Looks for floats in what a function computes: every node of its traced graph, by dtype."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves


def graph_of(function: Callable[..., Any], *tensors: torch.Tensor) -> GraphModule:
    """Every operation that the function makes, down to single ones of torch."""
    return make_fx(function)(*tensors)


def floats_in(graph: GraphModule) -> list[str]:
    """One line for each node that makes, holds or is given a float, or whose dtype is not known."""
    found = []
    for node in graph.graph.nodes:
        for value in _values(graph, node):
            if _is_float(value):
                found.append(f"{node.name} = {node.target}{node.args}")
                break
    return found


def _values(graph: GraphModule, node: Node) -> Iterator[Any]:
    yield from tree_leaves((node.args, node.kwargs))
    if node.op == "get_attr":
        yield getattr(graph, str(node.target))
    elif node.op != "output":
        assert node.op in ("placeholder", "call_function"), node.op
        yield from tree_leaves(node.meta["val"])


def _is_float(value: Any) -> bool:
    if isinstance(value, torch.dtype):
        return value.is_floating_point or value.is_complex
    if hasattr(value, "dtype"):
        return _is_float(value.dtype)
    return isinstance(value, float | complex)
