"""Where torch's documented gradient is not the derivative, a tensor that passes says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from audits.causes import Cause
from audits.gradients.graph import LossGraph
from audits.gradients.verdicts import Verdict
from audits.lanes.evaluation import Point
from audits.lanes.problem import Problem
from audits.outcomes import Outcome

#: Operators whose convention concerns everything upstream: how torch names their nodes in the graph.
NODES = {
    "fake_quantize": "FakeQuantize",
    "_fake_quantize": "FakeQuantize",
    "_fused_moving_avg_obs_fq_helper": "FusedMovingAvgObsFqHelper",
}


def with_conventions(problem: Problem, point: Point, verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """Return the verdicts, in those that pass and that a convention of torch's concerns that convention by name.

    Args:
        problem: the phase's loss, its tensors at theta.
        point: the point at theta, restored.
        verdicts: what was found.
    """
    met = point.program.conventions
    said = {id(c.tensor): c.text for c in met if c.tensor is not None}
    texts = {name: said[id(t)] for name, t in problem.tensors.items() if id(t) in said}
    upstream = {_node(c.operator): c.text for c in met if c.tensor is None}
    if upstream:
        graph = LossGraph(problem)
        for node, text in upstream.items():
            texts |= {name: text for name in graph.upstream_of_nodes(node) if name not in texts}
    return {name: _saying(name, verdict, texts.get(name)) for name, verdict in verdicts.items()}


def _node(operator: str) -> str:
    return next(node for prefix, node in NODES.items() if operator.startswith(prefix))


def _saying(name: str, verdict: Verdict, text: str | None) -> Verdict:
    if text is None or verdict.outcome is not Outcome.PASS or verdict.cause is not None:
        return verdict
    message = f"the gradient of {name!r} is the loss's derivative but for a convention of torch's: {text}"
    return replace(verdict, cause=Cause.CONVENTION, message=message)
