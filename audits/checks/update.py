"""The update: each parameter moves as its rule says, and nothing else moves."""

from __future__ import annotations

from audits.checks.check import Check, Threshold
from audits.outcomes import Severity

_REAL_STEPS = "healthy worst on real steps, torch 2.13: "

L2 = Threshold(value=4.0, unit="eps", of="L2, float32 and float64", source=_REAL_STEPS + "1.45")
MAX = Threshold(value=16.0, unit="eps", of="worst element, float32 and float64", source=_REAL_STEPS + "7.3")
L2_LOW = Threshold(value=3.0, unit="eps", of="L2, bfloat16 and float16", source=_REAL_STEPS + "0.71")
MAX_LOW = Threshold(value=25.0, unit="eps", of="worst element, bfloat16 and float16", source=_REAL_STEPS + "1.9")
LOST_SHARE = Threshold(
    value=0.5, unit="of the update's norm",
    source="what is left then makes an angle of asin(0.5) = 30 degrees with what is meant; bfloat16 weights whose "
    "learning rate is too small for them lose nearly all, healthy float32 nets below 1e-3",
)  # fmt: skip

RULE = Check(
    name="update.rule",
    unmet="the update does not follow its rule",
    claim="The parameter moved as the optimizer's rule says for the gradient the optimizer received.",
    formula="rms(d - d_ref) / (eps * (rms(theta) + rms(d_ref))), d the update",
    thresholds=(L2, MAX, L2_LOW, MAX_LOW),
    blind_to="terms of the rule below the row's resolution; data over many steps",
    where_to_look="The message names the rule that does explain the update, when one does.",
)

STATE = Check(
    name="update.state",
    unmet="the optimizer's state does not follow its rule",
    claim="The optimizer's state after the step is the rule's state.",
    formula="rms(s - s_ref) / (eps * (rms(s_ref) + rms(s before)))",
    bound="counters equal",
    thresholds=(L2, MAX, L2_LOW, MAX_LOW),
    where_to_look="State that is not loaded, reset, or updated twice.",
)

FROZEN = Check(
    name="update.frozen",
    unmet="frozen parameters move",
    claim="Frozen parameters, and those that no optimizer holds, stay bit for bit as they were.",
    bound="equality",
    where_to_look="Take frozen parameters out of the optimizer: weight decay and momentum move a parameter whose "
    "gradient is zero.",
)

ISOLATION = Check(
    name="update.isolation",
    unmet="a phase moves another phase's parameters",
    claim="A phase holds and moves only its own parameters.",
    bound="equality; parameters declared `shared` may belong to several phases",
    blind_to="phases that are one optimizer",
    where_to_look="The parameter list given to that phase's optimizer.",
)

OUTSIDE_STEP = Check(
    name="update.outside-step",
    unmet="parameters are written outside the optimizer",
    claim="No parameter is written outside `optimizer.step`, nor by a hook around its rule.",
    bound="equality; declared writes (`writes_outside_step`) warn, those of declared `step_hooks` pass",
    where_to_look="In-place writes to .data in hooks, forwards or the step function.",
)

FINITE = Check(
    name="update.finite",
    unmet="parameters are not finite after the step",
    claim="Every parameter is finite after the step.",
    bound="finite",
    where_to_look="The learning rate, an eps that the dtype rounds to 0, an overflowing second moment.",
)

LOST_TO_ROUNDING = Check(
    name="update.lost-to-rounding",
    unmet="the weights lose their updates to rounding",
    claim="The weight's dtype keeps the update.",
    severity=Severity.WARN,
    formula="elements that did not move though the rule moves them / elements that the rule moves",
    thresholds=(LOST_SHARE,),
    where_to_look="Keep float32 master weights, or round stochastically.",
)

CHECKS = (
    RULE,
    STATE,
    FROZEN,
    ISOLATION,
    OUTSIDE_STEP,
    FINITE,
    LOST_TO_ROUNDING,
)
