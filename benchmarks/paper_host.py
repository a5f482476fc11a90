"""What a training step asks of the host beside operators: Python calls and nodes of the autograd graph.

What a step calls on the meta device it calls on a GPU, but for the operators' own functions, which there are
C++ and here partly Python: these are not counted. Nothing is timed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import FrameType
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction

from benchmarks.walks import Walk

# Where operators of the meta device are written in Python.
META = re.compile(r".*/torch/(_meta_registrations\.py|_(refs|prims|prims_common|decomp|library)/.*)")


class HostWalk(Walk):
    """Counts Python calls but for those that operators make on the meta device alone."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0  # of calls below such an operator

    def _event(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "call" and (self._depth or META.match(frame.f_code.co_filename)):
            self._depth += 1
        elif self._depth:
            self._depth -= event == "return"
        else:
            super()._event(frame, event, arg)


def host_row(loss: Callable[[], Tensor]) -> dict[str, int]:
    """Of a step, forward and backward, that has run before."""
    nodes = graph_of(loss())
    with HostWalk() as walk:
        loss().backward()
    found = walk.result()
    return {
        "nodes": len(nodes), "python_nodes": sum(isinstance(n, BackwardCFunction) for n in nodes),
        "python_calls": found["calls"], "own_calls": found["own"], "torch_calls": found["torch"],
    }  # fmt: skip


def graph_of(result: Tensor) -> set[Any]:
    """The nodes of the autograd graph."""
    found: set[Any] = set()
    left = [result.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [parent for parent, _ in node.next_functions]
    return found
