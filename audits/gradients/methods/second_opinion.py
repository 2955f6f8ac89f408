"""`torch.autograd.gradcheck` itself, as a second opinion on the same float64 loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.gradcheck import GradcheckError

from audits.causes import Cause
from audits.gradients.verdicts import Verdict
from audits.lanes.problem import Problem, quiet
from audits.lanes.program import Free
from audits.outcomes import Outcome

#: Above so many elements `gradcheck` runs in its fast mode: one random projection instead of every element.
SLOW_LIMIT = 4096

#: gradcheck's own defaults; written out because they are the row's threshold.
EPSILON, ABSOLUTE, RELATIVE = 1e-6, 1e-5, 1e-3


def check_with_gradcheck(problem: Problem, names: Sequence[str]) -> dict[str, Verdict]:
    """Run `torch.autograd.gradcheck` per tensor (eps 1e-6, atol 1e-5, rtol 1e-3).

    Its kinks are not frozen and its tolerance is not scaled to the gradient: a relative error below 1e-3 and a gradient
    below 1e-5 are beyond it.
    """
    verdicts = {}
    for name in names:
        tensor = problem.tensors[name]

        def function(_: torch.Tensor) -> torch.Tensor:
            problem.before()
            with Free(problem.tape.cursor(), lift=problem.lifts):
                return problem.loss()

        fast = tensor.numel() > SLOW_LIMIT
        try:
            with quiet():
                torch.autograd.gradcheck(
                    function, (tensor,), eps=EPSILON, atol=ABSOLUTE, rtol=RELATIVE, fast_mode=fast, nondet_tol=ABSOLUTE,
                    check_undefined_grad=False, check_batched_grad=False,
                )  # fmt: skip
            verdicts[name] = Verdict(
                outcome=Outcome.PASS, threshold=RELATIVE, limit=RELATIVE, cause=Cause.GRADCHECK,
                message=f"torch.autograd.gradcheck ({'fast' if fast else 'slow'} mode) accepts {name!r}",
            )  # fmt: skip
        except GradcheckError as error:
            text = " ".join(str(error).split())[:300]
            verdicts[name] = Verdict(
                outcome=Outcome.FAIL, threshold=RELATIVE, limit=RELATIVE, cause=Cause.GRADCHECK,
                message=f"torch.autograd.gradcheck ({'fast' if fast else 'slow'} mode) refuses {name!r}: {text}",
            )  # fmt: skip
    return verdicts
