"""Running statistics and averages."""

from __future__ import annotations

from audits.checks.check import Check, Threshold

MOMENT = Threshold(value=8.0, unit="eps", source="a mean over a batch and one weighted sum; on top of it, what torch's "
                   "own kernel is off by on the same batches")  # fmt: skip
AVERAGE = Threshold(value=8.0, unit="eps", source="one weighted sum in the shadow's dtype")

BATCH_NORM = Check(
    name="buffers.batch-norm",
    unmet="running statistics do not move by BatchNorm's formula",
    claim="BatchNorm's running statistics move by its own formula, once per forward of the declared loss.",
    formula="rms(r - r_ref) / (eps * (rms(r_ref) + rms of the batch's moment))",
    thresholds=(MOMENT,),
    where_to_look="Extra forwards in train mode, momentum, or statistics overwritten in the step.",
)

EMA = Check(
    name="buffers.ema",
    unmet="an average does not move by its decay",
    claim="EMA shadows move by their decay towards the weights after the step; their buffers are copied, averaged "
    "likewise, or moved by their own forward.",
    formula="rms(s - s_ref) / (eps * rms(s_ref))",
    thresholds=(AVERAGE,),
    blind_to="shadows outside the model; what nobody declared",
    where_to_look="Update the average after optimizer.step(), with the declared decay, buffers included.",
)

CHECKS = (
    BATCH_NORM,
    EMA,
)
