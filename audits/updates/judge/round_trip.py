"""`registration.state-round-trip`: an optimizer whose rule is known, saved, loaded and stepped on."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import torch

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.updates.compare import THRESHOLDS, Deviation, deviation, judge, real_dtype, to_double
from audits.updates.judge.coarse_state import CoarseState
from audits.updates.judge.replay import Replay
from audits.updates.judge.synthetic import Synthetic
from audits.updates.judge.whose_step import torch_owned
from audits.updates.rules import Rule
from audits.updates.update_rows import row

CHECK = "registration.state-round-trip"

#: Step after which the state is saved.
SAVED_AFTER = 4


def round_trip(
    subject: Subject, phase: LivePhase, synthetic: Synthetic, rule: Rule, coarse: CoarseState | None = None
) -> ResultRow:  # fmt: skip
    """Return the row: stepped, saved, loaded and stepped on, against stepped throughout.

    Args:
        subject: the model under audit.
        phase: whose optimizer.
        synthetic: the probe's tensors.
        rule: its rule, by whose tolerance a cast in loading is judged.
        coarse: what is coarse in its state: torch loads it in the weights' dtype, which rounds no more.
    """
    if coarse is not None:
        rule = replace(rule, relative=dict.fromkeys(THRESHOLDS, coarse.tolerance))
    common: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC}
    loaded: Replay | None = None
    resuming = False
    try:
        going = Replay(synthetic.recipe, synthetic.weights[0], None, {})
        for number, (weights, gradients) in enumerate(
            zip(synthetic.weights, synthetic.gradients, strict=True), start=1
        ):
            one = going.step(weights, gradients, synthetic.options)
            resuming = number >= SAVED_AFTER
            if loaded is not None:
                other = loaded.step(weights, gradients, synthetic.options)
                apart = next((n for n in one if not torch.equal(one[n].nan_to_num(), other[n].nan_to_num())), None)
                if apart is not None:
                    kept = going.optimizer.state[going.copies[apart]].values()
                    found = deviation(other[apart], one[apart], to_double(weights[apart]),
                                      real_dtype(synthetic.native[apart]))  # fmt: skip
                    parting = _Parting(apart, number, found, int((one[apart] != other[apart]).sum()), tuple(kept))
                    return _parted_row(subject, phase, synthetic, rule, parting)
            if number == SAVED_AFTER:
                loaded = Replay(synthetic.recipe, weights, None, {})
                with io.BytesIO() as file:
                    torch.save(going.optimizer.state_dict(), file)
                    file.seek(0)
                    loaded.optimizer.load_state_dict(torch.load(file, weights_only=False))
            resuming = False
    except Exception as problem:
        told = f"{type(problem).__name__}: {problem}"
        if resuming:  # loud where it happens, and no step of this training is another one for it
            message = (f"a checkpoint of the optimizer of phase {phase.name!r} cannot be resumed: saving and loading "
                       f"its state_dict raises {told}")  # fmt: skip
            return row(subject, CHECK, Outcome.WARN, message, cause=Cause.CANNOT_BE_RESUMED, **common)
        message = f"the optimizer's state could not be saved and loaded: {told}"
        return row(subject, CHECK, Outcome.INCONCLUSIVE, message, cause=Cause.PROBE_RAISED, **common)
    message = f"saved, loaded and stepped equals stepped for phase {phase.name!r}, bit for bit"
    return row(subject, CHECK, Outcome.PASS, message, measured=0.0, expected=0.0, **common)


@dataclass(frozen=True)
class _Parting:
    """Where a loaded optimizer first went another way: the tensor, the step, how far, what is kept for the tensor."""

    name: str
    step: int
    found: Deviation
    elements: int
    kept: tuple[Any, ...]


def _parted_row(
    subject: Subject, phase: LivePhase, synthetic: Synthetic, rule: Rule, parting: _Parting
) -> ResultRow:  # fmt: skip
    """Judge a step after loading that is another one: state lost, or torch's cast as it loads."""
    name, step = parting.name, parting.step
    dtype = real_dtype(synthetic.native[name])
    found = judge(parting.found, rule, dtype, synthetic.options[name])
    cause, outcome = None, Outcome.FAIL
    message = (f"saved after step {SAVED_AFTER} and loaded into a fresh build, the optimizer of phase {phase.name!r} "
               f"goes another way at step {step} than one that never stopped: state that state_dict() does not hold, "
               "or load_state_dict() does not restore")  # fmt: skip
    tensors = [v for v in parting.kept if isinstance(v, torch.Tensor) and v.is_floating_point()]
    finer = any(v.dtype != dtype for v in tensors)
    if torch_owned(phase) or (finer and found.met):
        # torch casts state (NAdam's mu_product, moments in float32) to the weights' dtype as it loads.
        cause = None if found.met else Cause.ENVIRONMENT
        outcome = Outcome.PASS if found.met else Outcome.FAIL
        message += "; no code but torch's is involved"
        if found.met:
            message = (f"saved and loaded, the optimizer of phase {phase.name!r} goes on as one that never stopped, "
                       "but for a rounding: torch loads state in the weights' dtype")  # fmt: skip
    return row(subject, CHECK, outcome, message, measured=float(parting.elements), expected=0.0, step=step,
               error=found.error, threshold=found.threshold, cause=cause, phase=phase.name,
               lane=Lane.SYNTHETIC)  # fmt: skip
