"""The claims of ``health.*``: never more than a warning."""

from __future__ import annotations

from audits.checks.check import Check, Threshold
from audits.outcomes import Severity

_WARN = Severity.WARN

VANISHING_RATIO = Threshold(value=1e-3, of="first norm / last norm", setting="vanishing_ratio")
VANISHING_NORM = Threshold(value=1e-4, of="with a first norm below", setting="vanishing_norm")
VANISHING_MEAN = Threshold(
    value=1e-7, of="or mean |g| everywhere below", source="a step of 1e-3 of it is lost in float32"
)
EXPLODING_NORM = Threshold(value=70.0, of="norm", setting="exploding_norm")
HARMFUL_MOVE = Threshold(
    value=0.03,
    unit="of the weight",
    of="which the step moves it by, unclipped",
    source="30 times the 1e-3 of usual training",
)
RATIO = Threshold(value=0.3, of="norm(update) / norm(weight)", setting="update_ratio")
OUTPUT_SHARE = Threshold(
    value=3**-0.5, of="rms(update) sqrt(fan in)",
    source="what a layer as torch initialises it gives of inputs of variance 1: a step beyond that outweighs what the "
    "whole layer does; fresh Adam at 1e-3 gives 0.03 at a fan of 1,000, fresh RMSprop at its default rate 0.35 at 12",
)  # fmt: skip
LAYER_SHARE = Threshold(value=0.5, of="share of a layer's units")
CHANCE = Threshold(
    value=1e-3, of="chance that as many units of a layer are off by the toss of a coin",
    source="one false warning in a thousand layers; it takes ten units of which all are off",
)  # fmt: skip
FLAT_END = Threshold(
    value=1e-3, of="distance from an end of the range", source="the slope there is below 1e-3 (sigmoid), 2e-3 (tanh)"
)

VANISHING = Check(
    name="health.vanishing",
    unmet="the gradient vanishes towards the first layers",
    claim="The gradient does not vanish on its way to the first layers.",
    severity=_WARN,
    formula="norm(first) / norm(last) over weights in the order of the forward; mean |g|",
    bound="and the first half's median norm is below the second's",
    thresholds=(VANISHING_RATIO, VANISHING_NORM, VANISHING_MEAN),
    where_to_look="Initialisation, normalisation, residual paths; a converged model has small gradients too.",
)

EXPLODING = Check(
    name="health.exploding",
    unmet="the gradient explodes",
    claim="The gradient does not explode.",
    severity=_WARN,
    formula="norm of the parameter's gradient; norm(update) / norm(weight)",
    bound="finite; and not both, where the step scales with the gradient",
    thresholds=(EXPLODING_NORM, HARMFUL_MOVE),
    where_to_look="Learning rate, initialisation, clipping.",
)

ALL_ZERO = Check(
    name="health.all-zero",
    unmet="a gradient is all zero",
    claim="No parameter's gradient is all zero.",
    severity=_WARN,
    bound="some element not 0",
    where_to_look="Dead units, a branch the batch does not use, a zero-initialised factor.",
)

UPDATE_RATIO = Check(
    name="health.update-ratio",
    unmet="the step is too large for the weights",
    claim="A step moves a weight by a small part of itself.",
    severity=_WARN,
    formula="norm(update) / norm(weight); rms(update) sqrt(fan in)",
    thresholds=(RATIO, OUTPUT_SHARE),
    where_to_look="The learning rate; freshly zero-initialised weights are not judged.",
)

DEAD_RELU = Check(
    name="health.dead-relu",
    unmet="ReLUs are off for the whole batch",
    claim="No ReLU is off for a whole batch.",
    severity=_WARN,
    formula="share of units that are 0 for every example; chance that among units that never change so many are",
    thresholds=(LAYER_SHARE, CHANCE),
    where_to_look="Large negative biases, a learning rate that once was too high.",
)

SATURATION = Check(
    name="health.saturation",
    unmet="activations work at their flat ends",
    claim="Sigmoids and tanhs work away from their flat ends.",
    severity=_WARN,
    formula="share of outputs within 1e-3 of an end",
    thresholds=(LAYER_SHARE, FLAT_END),
    where_to_look="Scale of the inputs and of the weights before them.",
)

CHECKS = (VANISHING, EXPLODING, ALL_ZERO, UPDATE_RATIO, DEAD_RELU, SATURATION)
