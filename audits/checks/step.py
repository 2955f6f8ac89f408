"""The training step: the gradient handed over, and how the step function handles its optimizers."""

from __future__ import annotations

from audits.checks.check import Check, Threshold

_STEP = "Without a `step` function in the recipe the step is the audit's own, and the row is skipped."

GRADIENT_EPS = Threshold(
    value=1024.0, unit="eps", of="float32 and float64",
    source="the scatter of changed thread counts, torch 2.13, was 562 at most, of equal ones 0; a mean of means stands "
    "at 7e5",
)  # fmt: skip
GRADIENT_EPS_LOW = Threshold(
    value=4.0, unit="eps", of="bfloat16 and float16",
    source="with equal threads the scatter was 0, torch 2.13; a mean of means stands at 11 to 19",
)  # fmt: skip
NORM = Threshold(value=1e-3, of="float32 and float64", source="a norm over all gradients in float32")
NORM_LOW = Threshold(value=0.15, of="bfloat16 and float16", source="a norm of gradients rounded to 8 bits or 11")
RATE = Threshold(value=1e-9, source="a learning rate went through a few float64 operations")
RATE_TENSOR = Threshold(
    value=1e-6, of="a rate held in a tensor", source="a learning rate went through a float32 tensor"
)

LOSS_FINITE = Check(
    name="step.loss-finite",
    unmet="the loss is not finite",
    claim="The loss of every phase is finite.",
    bound="finite",
    where_to_look="Logarithms, divisions and square roots at 0; overflow of float16.",
)

BATCH_UNCHANGED = Check(
    name="step.batch-unchanged",
    unmet="the batch is changed in place",
    claim="The training step leaves its batch as it was: the next step on it is given the same data.",
    bound="equality; a change on which the second step's gradient does not depend only warns",
    blind_to="data that the step keeps elsewhere than in its batch",
    where_to_look="In-place operations (`+=`, `mul_`, `masked_fill_`, `labels[mask] = -100`) on what came from the "
    "batch, in the step, the loss or the forward.",
)

GRADIENT_PRESENT = Check(
    name="step.gradient-present",
    unmet="a gradient does not reach the optimizer",
    claim="Every trainable parameter's gradient reaches the optimizer, finite and not all zero.",
    bound="present and finite; absent or all zero where the loss's own gradient is too only warns; absent "
    "fails a parameter that expect['trainable'] declares",
    blind_to="single rows or elements without a gradient",
    where_to_look="detach, no_grad, .item() or .data on the way from the parameter to the loss.",
)

GRADIENT = Check(
    name="step.gradient",
    unmet="the optimizer receives another gradient than the loss's",
    claim="The gradient that the optimizer receives is the declared loss's gradient on the recipe's batch.",
    formula="rms(received - reference) / (eps * (rms(reference) + 0.01 * rms of the whole gradient))",
    thresholds=(GRADIENT_EPS, GRADIENT_EPS_LOW),
    blind_to="errors that the loss function and the step share: the gradient check's business; a batch that "
    "the step makes anew in each step, with random numbers, is judged as it was given to the loss",
    where_to_look="Accumulation, loss scaling, clipping, zero_grad and detach in the step function.",
)

CLIPPING = Check(
    name="step.clipping",
    unmet="gradients are not clipped as declared",
    claim="Gradients are clipped once per phase, at their true norm, as declared.",
    formula="|norm that clipping saw - reference norm| / reference norm",
    thresholds=(NORM, NORM_LOW),
    blind_to=_STEP,
    where_to_look="Clip after unscaling, over a list (a generator is exhausted by its first use), before step().",
)

COUNT = Check(
    name="step.count",
    unmet="the optimizer does not step once per training step",
    claim="`step()` is called once per phase and training step.",
    bound="once",
    blind_to=_STEP,
    where_to_look="A step inside the micro-batch loop, or in both the closure and the loop.",
)

LEARNING_RATE = Check(
    name="step.learning-rate",
    unmet="the learning rate is not the scheduled one",
    claim="The learning rate at each step is the scheduled one, else the one that expect['lr'] declares.",
    formula="|lr - scheduled lr| / scheduled lr",
    thresholds=(RATE, RATE_TENSOR),
    blind_to=_STEP,
    where_to_look="scheduler.step() comes after optimizer.step(), once.",
)

MODE = Check(
    name="step.mode",
    unmet="modules are not in the declared mode",
    claim="Modules are in train or eval mode as declared in the forwards that lead to a gradient.",
    bound="equal",
    blind_to=_STEP,
    where_to_look="model.train() after the last evaluation.",
)

FIRST_CALL = Check(
    name="step.first-call",
    unmet="the first call of a process gives another gradient",
    claim="A process's first loss and gradient are what every later evaluation gives.",
    formula="|n_1 - n_2| / max(n_1, n_2, 1e-2 n), n the norms of a parameter's gradient and of the whole one",
    bound="sqrt(eps) of the coarsest dtype in use; a fresh process must show it again",
    blind_to="a process in which the model ran before the audit; what the second call does wrong as well",
    where_to_look="Autotuning that runs an in-place kernel several times, initialisation or a cache at the first call.",
)

CHECKS = (
    LOSS_FINITE,
    BATCH_UNCHANGED,
    GRADIENT_PRESENT,
    GRADIENT,
    CLIPPING,
    COUNT,
    LEARNING_RATE,
    MODE,
    FIRST_CALL,
)
