"""Where rounding decides: elements of an update whose formula blows a last-digit change up."""

from __future__ import annotations

import torch

from audits.devices import Draws
from audits.updates.compare import Judgement, deviation, judge, real_dtype, rms, to_double
from audits.updates.judge.apply_rule import copy_state, reference_update
from audits.updates.judge.expected import Expected
from audits.updates.rules import Rule

#: The native run rounds at each of the handful of operations of a rule; each response below is that of one rounding.
ROUNDINGS = 8.0

#: Draws of the signs of the rounding.
DRAWS = 3

#: Draws for a rule that takes a sign, each as large as all roundings together: what turns one element's sign is a
#: combination of the signs of at most three numbers, which 24 draws miss once in 25 (seven eighths to the 24th).
SIGN_DRAWS = 24


def judge_conditioned(
    rule: Rule, actual: torch.Tensor, expected: Expected, dtype: torch.dtype, known: tuple[float, float] | None = None
) -> Judgement:
    """Judge an update; what misses the threshold is judged again without what rounding explains.

    The sign of a gradient that weight decay cancels to a last digit, or a centered variance that is the difference of
    equal numbers, is rounding: Adagrad's and Adam's first step make it an lr-sized update. The rule's own response to
    changes of one eps in gradient, weights and state is taken off each element's difference; where the formula is
    well-conditioned that is next to nothing.

    Args:
        rule: the rule.
        actual: the update made, float64.
        expected: what the rule makes of the same gradient, weights and state.
        dtype: dtype of the lane's weights.
        known: rms of theta and of the reference, where they were worked out already.
    """
    theta, reference = expected.theta, expected.update
    if rule.inside is not None:
        size, length = known or (rms(theta), rms(reference))
        inside = rule.inside(theta, to_double(expected.gradient), expected.before, expected.options)
        known = max(size, inside), length
    found = judge(deviation(actual, reference, theta, dtype, known), rule, dtype, expected.options, expected.noise)
    if found.met or not bool(torch.isfinite(actual).all()):
        return found
    difference = actual - reference
    response = rounding_response(rule, expected, dtype)
    left = difference.sign() * (difference.abs() - ROUNDINGS * response).clamp(min=0.0)
    again = deviation(reference + left, reference, theta, dtype, known)
    return judge(again, rule, dtype, expected.options, expected.noise)


def rounding_response(rule: Rule, expected: Expected, dtype: torch.dtype) -> torch.Tensor:
    """Return, per element, the largest change of the update under changes of one eps in what it is made from."""
    gradient = expected.gradient
    draws = Draws(0)
    eps = torch.finfo(real_dtype(dtype)).eps * (ROUNDINGS if rule.signs else 1.0)

    def shaken(value: torch.Tensor) -> torch.Tensor:
        signs = torch.randint(0, 2, value.shape, **draws.on(value.device)).to(torch.float64) * 2.0 - 1.0
        return value * (1.0 + eps * signs)

    def shaken_gradient() -> torch.Tensor:
        if not gradient.is_sparse:
            return shaken(to_double(gradient))
        found = gradient.coalesce()
        return torch.sparse_coo_tensor(found.indices(), shaken(found.values().double()), found.shape,
                                       check_invariants=False).coalesce()  # fmt: skip

    response = torch.zeros_like(expected.update)
    for _ in range(SIGN_DRAWS if rule.signs else DRAWS):
        other = {k: shaken(v) if isinstance(v, torch.Tensor) else v for k, v in copy_state(expected.before).items()}
        update = reference_update(rule, shaken(expected.theta), shaken_gradient(), other, expected.options)
        response = torch.maximum(response, (update - expected.update).abs().nan_to_num(nan=0.0))
    return response
