"""The claims of ``health.*``: never more than a warning."""

from __future__ import annotations

from audits.outcomes import Check, Severity

_WARN = Severity.WARN

HEALTH_CHECKS: tuple[Check, ...] = (
    Check(
        name="health.vanishing",
        claim="The gradient does not vanish on its way to the first layers.",
        severity=_WARN,
        formula="norm(first) / norm(last) over weights in the order of the forward; mean |g|",
        threshold=(
            "ratio 1e-3 with a first norm below 1e-4, the first half's median norm below the second's; or mean |g| "
            "below 1e-7 everywhere"
        ),
        where_to_look="Initialisation, normalisation, residual paths; a converged model has small gradients too.",
    ),
    Check(
        name="health.exploding",
        claim="The gradient does not explode.",
        severity=_WARN,
        formula="norm of the parameter's gradient; norm(update) / norm(weight)",
        threshold="not finite; or 70 where the step scales with it, nothing clips and it moves the weight by 3 %",
        where_to_look="Learning rate, initialisation, clipping.",
    ),
    Check(
        name="health.all-zero",
        claim="No parameter's gradient is all zero.",
        severity=_WARN,
        threshold="some element not 0",
        where_to_look="Dead units, a branch the batch does not use, a zero-initialised factor.",
    ),
    Check(
        name="health.update-ratio",
        claim="A step moves a weight by a small part of itself.",
        severity=_WARN,
        formula="norm(update) / norm(weight); rms(update) sqrt(fan in)",
        threshold="0.3, and 0.58",
        where_to_look="The learning rate; freshly zero-initialised weights are not judged.",
    ),
    Check(
        name="health.dead-relu",
        claim="No ReLU is off for a whole batch.",
        severity=_WARN,
        formula="share of units that are 0 for every example; chance that among units that never change so many are",
        threshold="0.5, and 1e-3",
        where_to_look="Large negative biases, a learning rate that once was too high.",
    ),
    Check(
        name="health.saturation",
        claim="Sigmoids and tanhs work away from their flat ends.",
        severity=_WARN,
        formula="share of outputs within 1e-3 of an end",
        threshold="0.5",
        where_to_look="Scale of the inputs and of the weights before them.",
    ),
)

#: By name.
BY_NAME = {check.name: check for check in HEALTH_CHECKS}
