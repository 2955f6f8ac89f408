"""The optimizer build on synthetic gradients."""

from __future__ import annotations

from audits.checks.check import Check
from audits.checks.update import L2

PROBE = Check(
    name="optimizer.probe",
    unmet="the optimizer does not follow its rule on synthetic gradients",
    claim="The optimizer follows its rule over 8 steps of synthetic gradients: small, flipped, zero and large.",
    formula="as update.rule, the worst of 8 steps",
    bound="as update.rule",
    where_to_look="The message names the first step and the rule that does explain it.",
)

PARITY = Check(
    name="optimizer.parity",
    unmet="the fast implementation does not agree with the plain loop",
    claim="The foreach or fused implementation in use agrees with the plain loop.",
    formula="rms(d - d_loop) / (eps * (rms(theta) + rms(d_loop))), the worst of 8 steps",
    thresholds=(L2,),
    blind_to="implementations that the recipe does not use",
    where_to_look="foreach=False, fused=False avoids a faulty kernel.",
)

INVARIANTS = Check(
    name="optimizer.invariants",
    unmet="the optimizer breaks what every optimizer keeps",
    claim="An optimizer without a reference rule keeps what every optimizer keeps: it repeats itself, leaves "
    "tensors without gradient alone, steps each group with its own options and each tensor for itself, goes on "
    "after saving and loading, reads its options, goes the same way in float32 and in every kernel, and lowers "
    "convex losses.",
    bound="sqrt(eps) of a step, see the message; what is not torch's contract warns",
    blind_to="any formula that keeps these relations",
    where_to_look="The message names the relation. Declare `expect={'optimizer': 'AdamW'}` to have a class of "
    "your own judged by a known rule.",
)

CHECKS = (
    PROBE,
    PARITY,
    INVARIANTS,
)
