"""Weights that are products of two, as a compressed attention's, in a graph: inputs are multiplied by one
factor and then by the other, so that no exporter multiplies the two out."""

from __future__ import annotations

from typing import Any

from torch import ops
from torch.export import ExportedProgram
from torch.fx import Graph, Node

LINEAR = ops.aten.linear.default


def keep_two_products(program: ExportedProgram) -> None:
    """x·(U·Vᵀ)ᵀ + b, where U and V are parameters, becomes (x·V)·Uᵀ + b, in place. Where a part of such a
    weight is used, or it costs more, it stays."""
    graph = program.graph_module.graph
    parameters = {*program.graph_signature.inputs_to_parameters}
    for node in list(graph.nodes):
        if _is_linear(node) and _is_linear(weight := node.args[1]):
            left, right = weight.args[:2]  # (out, r), (in, r)
            if {left.name, right.name} <= parameters and len(weight.args) == 2 and _pays(weight):
                _split(graph, node, left, right)
    graph.eliminate_dead_code()
    program.graph_module.recompile()


def _is_linear(node: object) -> bool:
    return isinstance(node, Node) and node.target is LINEAR


def _pays(weight: Node) -> bool:
    """Whether the factors have fewer entries than the weight."""
    out, inner = weight.meta["val"].shape
    rank = weight.args[0].meta["val"].shape[1]  # type: ignore[union-attr]  # a parameter
    return bool(rank * (out + inner) < out * inner)


def _split(graph: Graph, node: Node, left: Node, right: Node) -> None:
    """Put two nodes in the place of one."""
    x: Any = node.args[0]
    with graph.inserting_before(node):
        turned = graph.call_function(ops.aten.t.default, (right,))  # (r, in)
        inner = graph.call_function(LINEAR, (x, turned))
    turned.meta["val"] = right.meta["val"].mT
    inner.meta["val"] = x.meta["val"].new_empty((*x.meta["val"].shape[:-1], left.meta["val"].shape[1]))
    node.args = (inner, left, *node.args[2:])
