"""The autograd graph from the loss to the parameters: who is upstream of whom, and how far from the loss."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free


class LossGraph:
    """The graph of one evaluation at theta.

    Attributes:
        distance: tensor name -> number of nodes between it and the loss, the shortest way.
    """

    def __init__(self, problem: Problem) -> None:
        problem.before()
        with quiet(), Free(problem.tape.cursor(), lift=problem.lifts):
            self._loss = problem.loss()
        self._names = {id(tensor): name for name, tensor in problem.tensors.items()}
        self.distance: dict[str, int] = {}
        self._nodes: list[Any] = []
        self._walk()

    def upstream_of(self, function: type) -> set[str]:
        """Return the tensors whose gradient passes through any node of a custom Function."""
        found: set[str] = set()
        for node in self._nodes:
            if getattr(node, "_forward_cls", None) is function or type(node).__name__ == f"{function.__name__}Backward":
                found |= self._reached(node)
        return found

    def upstream_of_nodes(self, prefix: str) -> set[str]:
        """Return the tensors whose gradient passes through any node whose name begins so."""
        found: set[str] = set()
        for node in self._nodes:
            if type(node).__name__.startswith(prefix):
                found |= self._reached(node)
        return found

    def _walk(self) -> None:
        start = self._loss.grad_fn
        if start is None:
            return
        queue = deque([(start, 0)])
        seen = {start}
        while queue:
            node, depth = queue.popleft()
            self._nodes.append(node)
            name = self._name(node)
            if name is not None:
                self.distance.setdefault(name, depth)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    queue.append((following, depth + 1))

    def _reached(self, start: Any) -> set[str]:
        found: set[str] = set()
        stack, seen = [start], {start}
        while stack:
            node = stack.pop()
            name = self._name(node)
            if name is not None:
                found.add(name)
            for following, _ in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    stack.append(following)
        return found

    def _name(self, node: Any) -> str | None:
        variable = getattr(node, "variable", None)
        return self._names.get(id(variable)) if isinstance(variable, torch.Tensor) else None


def root_of(names: Mapping[str, object] | list[str], graph: LossGraph) -> str:
    """Return the tensor nearest to the loss: the error lies between it and the loss."""
    return min(names, key=lambda name: graph.distance.get(name, 1 << 30))
