"""What the gradient checks claim. Imports nothing heavy: `audits.checks` reads it."""

from __future__ import annotations

from audits.outcomes import Check, Severity

FINITE_DIFFERENCE = Check(
    name="gradient.finite-difference",
    claim="Autograd's gradient of the loss with respect to the parameter is the derivative of the loss.",
    severity=Severity.FAIL,
    formula="error = |D - <g, v>|, D the Romberg-extrapolated central difference of the float64 loss along v",
    threshold="B = |D - R1| + 6 * 1.44 sigma / (sqrt(2) h/4) + 8 u sum|g v|, sigma the measured noise of the loss",
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
    claim="The operations that train the model in its own dtype have the same vector-Jacobian product as in float64.",
    severity=Severity.FAIL,
    formula="error = ||vjp_native - vjp_float64|| over all floating inputs of one call, same inputs and cotangent",
    threshold=(
        "64 (float32) or 16 (bfloat16, float16) times (eps ||vjp|| + the float64 vjp's response to 1-ulp input "
        "noise); 1,024 for ctc_loss; measured: healthy worst 12 and 3.1 over 5,211 calls"
    ),
    blind_to="relative errors of 1e-3 in bfloat16; operations without a float64 kernel",
    where_to_look="The named operation's kernel in this dtype on this device: another backend, or float32, avoids it.",
)

INPUT = Check(
    name="gradient.input",
    claim="Autograd's gradient of the loss with respect to the batch's floating tensors is the derivative of the loss.",
    severity=Severity.FAIL,
    formula="as gradient.finite-difference, the batch's tensors in place of the parameters",
    threshold="as gradient.finite-difference",
    blind_to="as gradient.finite-difference; skipped above input_gradient_limit trainable elements",
    where_to_look="The first layers and the preprocessing inside the loss: a detach() or no_grad() between them.",
)

GRADIENT_CHECKS: tuple[Check, ...] = (FINITE_DIFFERENCE, NATIVE_DTYPE, INPUT)

#: Judged only where something is compiled, and only when the settings ask for it.
COMPILED = Check(
    name="gradient.compiled",
    claim="The compiled code's gradient is the eager code's; where it draws random numbers, its own loss's derivative.",
    severity=Severity.FAIL,
    formula=(
        "error = ||g_compiled - g_eager|| per tensor in the model's dtype; with random numbers |D - <g, v>| of the "
        "compiled loss in float64, same seed before every evaluation"
    ),
    threshold=(
        "64 (float32, float64) or 16 (below) times (eps ||g|| + the eager gradient's response to 1-ulp noise in "
        "parameters and batch); with random numbers the difference's own bound and 1 % of the slope, at both of two "
        "points"
    ),
    blind_to=(
        "errors below the threshold; kernels of another dtype where random numbers are drawn; skipped unless the "
        "setting compiled is true"
    ),
    where_to_look=(
        "The compiler's options (activation_memory_budget, custom passes, the backend): what the backward recomputes "
        "must be what the forward computed."
    ),
)
