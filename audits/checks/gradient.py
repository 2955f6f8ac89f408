"""What the gradient checks claim. Imports nothing heavy: `audits.checks` reads it."""

from __future__ import annotations

from audits.checks.check import Check, Threshold
from audits.outcomes import Severity

_CALLS = "healthy worst over 5,211 calls: "

DETECTION_LIMIT = Threshold(
    value=1e-3, of="relative error that must be detectable for a pass", setting="detection_limit",
    source="a promise: a relative error as large would have been found wherever a gradient passes",
)  # fmt: skip
NATIVE = Threshold(
    value=64.0, of="float32 and float64", source=_CALLS + "12; a planted 1e-3 in float32 stands at 8,400"
)
NATIVE_LOW = Threshold(value=16.0, of="bfloat16 and float16", source=_CALLS + "3.1")
NATIVE_PRODUCTS = Threshold(
    value=4.0, of="products rounded to TF32 or bfloat16 inside float32",
    source="one rounding of each factor is an eps at most; healthy products came to 0.08 of this, recurrent "
    "nets of 10 to 500 steps to 0.23",
)  # fmt: skip
NATIVE_CTC = Threshold(value=1024.0, of="ctc_loss", source="it sums over all alignments in log space")
KINK_SHARE = Threshold(
    value=1e-2, of="share of the slope",
    source="what kinks may add at the smaller of two steps; draws taken anew are off by as much as the slope itself",
)  # fmt: skip

FINITE_DIFFERENCE = Check(
    name="gradient.finite-difference",
    unmet="the gradient is not the derivative of the loss",
    claim="Autograd's gradient of the loss with respect to the parameter is the derivative of the loss.",
    severity=Severity.FAIL,
    formula="error = |D - <g, v>|, D the Romberg-extrapolated central difference of the float64 loss along v",
    thresholds=(DETECTION_LIMIT,),
    bound="B = |D - R1| + 6 * 1.44 sigma / (sqrt(2) h/4) + 8 u sum|g v|, sigma the measured noise of the loss",
    blind_to=(
        "relative errors below detection_limit; kernels that only run in the native dtype (gradient.native-dtype "
        "judges those); everything behind a declared stop-gradient"
    ),
    where_to_look=(
        "A custom autograd.Function's backward, a detach() or no_grad() in the forward, a hook that changes gradients, "
        "in the named module or between it and the next parameter towards the loss."
    ),
)

NATIVE_DTYPE = Check(
    name="gradient.native-dtype",
    unmet="an operation differentiates wrongly in the dtype it trains in",
    claim="The operations that train the model in its own dtype have the same vector-Jacobian product as in float64.",
    severity=Severity.FAIL,
    formula="error = ||vjp_native - vjp_float64|| over all floating inputs of one call, same inputs and cotangent",
    bound="times (eps ||vjp|| + the float64 vjp's response to 1-ulp input noise)",
    thresholds=(NATIVE, NATIVE_LOW, NATIVE_PRODUCTS, NATIVE_CTC),
    blind_to="relative errors of 1e-3 in bfloat16; operations without a float64 kernel",
    where_to_look="The named operation's kernel in this dtype on this device: another backend, or float32, avoids it.",
)

INPUT = Check(
    name="gradient.input",
    unmet="the gradient of the batch is not the derivative of the loss",
    claim="Autograd's gradient of the loss with respect to the batch's floating tensors is the derivative of the loss.",
    severity=Severity.FAIL,
    formula="as gradient.finite-difference, the batch's tensors in place of the parameters",
    bound="as gradient.finite-difference",
    blind_to="as gradient.finite-difference; skipped above input_gradient_limit trainable elements",
    where_to_look="The first layers and the preprocessing inside the loss: a detach() or no_grad() between them.",
)

#: Judged only where something is compiled, and only when the settings ask for it.
COMPILED = Check(
    name="gradient.compiled",
    unmet="the compiled code gives another gradient than the eager code",
    claim="The compiled code's gradient is the eager code's; where it draws random numbers, its own loss's derivative.",
    severity=Severity.FAIL,
    formula=(
        "error = ||g_compiled - g_eager|| per tensor in the model's dtype; with random numbers |D - <g, v>| of the "
        "compiled loss in float64, same seed before every evaluation"
    ),
    bound="times (eps ||g|| + the eager gradient's response to 1-ulp noise in parameters and batch); with random "
    "numbers the difference's own bound and a share of the slope, at both of two points",
    thresholds=(NATIVE, NATIVE_LOW, KINK_SHARE),
    blind_to=(
        "errors below the threshold; kernels of another dtype where random numbers are drawn; skipped unless the "
        "setting compiled is true"
    ),
    where_to_look=(
        "The compiler's options (activation_memory_budget, custom passes, the backend): what the backward recomputes "
        "must be what the forward computed."
    ),
)

CHECKS = (FINITE_DIFFERENCE, NATIVE_DTYPE, INPUT, COMPILED)
