"""The audit's own training step, for a recipe that brings none."""

from __future__ import annotations

import functools
import inspect

import torch

from audits.live.subject import LivePhase, Subject
from audits.updates.judge.apply_rule import is_lbfgs, rule_for
from audits.updates.record.context import StepContext
from audits.updates.relations import working_request
from audits.updates.relations.bench import PLAIN


def canonical_step(subject: Subject, context: StepContext) -> None:
    """Do for each phase: zero_grad, forward and backward per micro-batch, unscale, clip, step, scheduler."""
    for phase in subject.phases:
        optimizer, scaler = context.optimizers[phase.name], context.scaler
        request = working_request(subject, phase) if not is_lbfgs(phase) and rule_for(subject, phase) is None else PLAIN
        evaluate = functools.partial(_evaluate, subject, context, phase, graph=request.graph)
        if request.closure or needs_closure(optimizer):
            optimizer.step(evaluate)  # type: ignore[arg-type]  # torch takes tensors too
        else:
            evaluate()
            scaler.unscale_(optimizer) if scaler.is_enabled() else None
            if phase.recipe.clip_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(list(phase.parameters.values()), phase.recipe.clip_grad_norm)
            scaler.step(optimizer)
        if phase.name in context.schedulers:
            context.schedulers[phase.name].step()
    context.scaler.update()


def _evaluate(subject: Subject, context: StepContext, phase: LivePhase, *, graph: bool = False) -> torch.Tensor:
    """Clear the gradients, run every micro-batch forward and backward, and return the loss."""
    context.optimizers[phase.name].zero_grad()
    total: torch.Tensor | None = None
    for weight, batch in subject.micro_batches(phase):
        with torch.enable_grad(), subject.autocast():  # some optimizers call their closure under no_grad
            loss = phase.weighted_loss(subject.model, batch, weight)
        if not weight:
            continue  # a micro-batch without a target that counts: its mean is nan
        context.scaler.scale(loss).backward(create_graph=graph)  # type: ignore[no-untyped-call]
        total = loss.detach() if total is None else total + loss.detach()
    assert total is not None
    return total


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's ``step`` cannot do without a closure, as LBFGS's."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty
