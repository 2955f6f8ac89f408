"""Synthetic audits to render: the rows a real audit writes, at any size, with any outcome."""

from __future__ import annotations

import datetime
import math
import random

from audits.outcomes import Coverage, Lane, Outcome, ResultRow
from audits.report import AuditReport
from audits.results.format import AuditIdentity

RERUN = "gradaudit audit models:/char-gpt/2 {options}"

#: Names no page may let through: markup, template and shell syntax, terminal escapes, text that runs backwards.
HOSTILE = (
    "</script><script>alert(1)</script>",
    "{{ 7 * 7 }}{% raw %}",
    '"><img src=x onerror=alert(1)>',
    "\x1b[31mred\x1b[0m\x07",
    "a\u202eb`*_[x](y)",
    "$\\frac{1}{0}$; rm -rf ~ 'q",
)


def names_of(tensors: int) -> list[str]:
    """Names like GPT-2's: an embedding, blocks of twelve, a head."""
    inner = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
             "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight",
             "mlp.c_proj.bias"]  # fmt: skip
    names = ["transformer.wte.weight", "transformer.wpe.weight"]
    block = 0
    while len(names) < tensors - 2:
        names += [f"transformer.h.{block}.{name}" for name in inner]
        block += 1
    return [*names[: tensors - 2], "transformer.ln_f.weight", "transformer.ln_f.bias"]


def report_of(
    tensors: int = 5,
    *,
    failing: tuple[int, ...] = (),
    inconclusive: tuple[int, ...] = (),
    warned: tuple[int, ...] = (),
    names: list[str] | None = None,
) -> AuditReport:
    """Return an audit of that many tensors, with the outcomes named by position."""
    random.seed(0)
    names = names or names_of(tensors)
    rows = [
        ResultRow(check="registration.coverage", outcome=Outcome.PASS, message="every trainable parameter is held"),
        ResultRow(check="step.clipping", outcome=Outcome.SKIPPED, cause="not declared",
                  message="the recipe declares no clipping"),
        ResultRow(check="registration.tied", outcome=Outcome.SKIPPED, message="the recipe records no tied parameters"),
        ResultRow(check="step.loss-finite", outcome=Outcome.PASS, phase="step", step=1, message="the loss is 4.17"),
    ]  # fmt: skip
    for index, name in enumerate(names):
        rows.append(_gradient(index, name, len(names), bad=index in failing, open_=index in inconclusive))
    for index, name in enumerate(names):
        rows.append(_update(index, name, len(names)))
        if index in warned:
            rows.append(_lost(name))
    coverage = Coverage.of(rows, dict.fromkeys(names, 768))
    identity = AuditIdentity(
        audit_id="3f9ac2", audited_at=datetime.datetime(2026, 1, 31, 4, 12, tzinfo=datetime.UTC), model_name="char-gpt",
        model_version=2, model_digest="sha256:5d0c8e1f", recipe_digest="sha256:77a1", settings_digest="sha256:01bc",
        torch="2.13.0", device="cpu", artifact_kind="eager", isolation="bubblewrap",
    )  # fmt: skip
    return AuditReport(
        rows=tuple(rows), coverage_of=coverage, identity=identity, seconds=41.3, run_id="0a1b2c",
        provenance={"batch": "declared", "loss": "declared", "optimizer": "declared", "step": "assumed"},
    )  # fmt: skip


def _module(name: str) -> str:
    path = name.rpartition(".")[0]
    kind = "LayerNorm" if "ln_" in name else "Embedding" if "wte" in name or "wpe" in name else "Conv1D"
    return f"{kind} ({path})" if path else kind


def _gradient(index: int, name: str, total: int, *, bad: bool, open_: bool) -> ResultRow:
    size = 10 ** (-1.5 - 2 * index / total + random.gauss(0, 0.4))
    limit = 10 ** (-9.5 + random.gauss(0, 0.5)) if not open_ else 10 ** (-2 + random.gauss(0, 0.2))
    bound, expected = limit * size / 45, size * random.choice((-1, 1)) * random.uniform(0.4, 1)
    measured = 2 * expected if bad else expected + bound * random.uniform(0.01, 0.5)
    zero = index == total - 1
    outcome = Outcome.FAIL if bad else Outcome.INCONCLUSIVE if open_ else Outcome.PASS
    message = f"the gradient of {name!r} is the loss's derivative along a random direction"
    if bad:
        message = (f"the gradient of {name!r} is wrong: autograd gives {measured:.6g}, the loss's derivative is "
                   f"{expected:.6g} (bound {bound:.2g})")  # fmt: skip
    elif open_:
        message = f"the gradient of {name!r} is too small to resolve: an error below {limit:.1e} would not show"
    return ResultRow(
        check="gradient.finite-difference", outcome=outcome, phase="step", lane=Lane.FLOAT64, parameter=name,
        module=_module(name), numel=768 * (1 + index % 4), dtype="torch.float32", measured=0.0 if zero else measured,
        expected=0.0 if zero else expected, error=0.0 if zero else abs(measured - expected), threshold=bound,
        detection_limit=None if zero else limit, parameter_norm=math.sqrt(768), gradient_norm=0.0 if zero else size,
        seed=0, cause="unresolved" if open_ else None, message=message,
        where_to_look=None if outcome is Outcome.PASS else (
            "A custom autograd.Function's backward, a detach() or no_grad() in the forward, a hook that changes "
            f"gradients, in the named module. {name} is held by {_module(name)}."
        ),
    )  # fmt: skip


def _update(index: int, name: str, total: int) -> ResultRow:
    return ResultRow(
        check="update.rule", outcome=Outcome.PASS, phase="step", step=1, lane=Lane.NATIVE, parameter=name,
        module=_module(name), numel=768 * (1 + index % 4), dtype="torch.float32", error=random.uniform(0, 1.4),
        threshold=4.0, detection_limit=1e-6, parameter_norm=math.sqrt(768), seed=0,
        update_norm=math.sqrt(768) * 10 ** (-3 + random.gauss(0, 0.3) - index / total),
        message=f"{name} moved as AdamW's rule says",
    )  # fmt: skip


def _lost(name: str) -> ResultRow:
    from audits.outcomes import Severity

    return ResultRow(
        check="update.lost-to-rounding", outcome=Outcome.WARN, severity=Severity.WARN, phase="step", step=1,
        lane=Lane.NATIVE, parameter=name, module=_module(name), measured=0.81, expected=0.0, error=0.81, threshold=0.5,
        seed=0, message=f"81 % of the elements of {name} did not move though the rule moves them",
        where_to_look="Keep float32 master weights, or round stochastically.",
    )  # fmt: skip
