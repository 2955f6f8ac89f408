"""What `expect` declares of the optimizer, compared with what each parameter's group says."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from audits.causes import Cause
from audits.globs import matches
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Outcome, ResultRow
from audits.updates.judge.apply_rule import expected_class_name, why_not_held_to
from audits.updates.update_rows import row

#: Keys of ``expect`` that are options of a param group.
OPTION_KEYS = ("lr", "weight_decay", "betas", "momentum", "eps", "amsgrad", "nesterov", "maximize")

#: Options that went through a file come back within a rounding of a decimal: equal to 12 digits is equal.
RELATIVE_TOLERANCE = 1e-12

_CHECK = "registration.hyperparameters"


def hyperparameter_rows(subject: Subject) -> list[ResultRow]:
    """Return a row per phase that agrees, and one per parameter and option that does not."""
    declared = {key: subject.recipe.expect[key] for key in OPTION_KEYS if key in subject.recipe.expect}
    expected_class = subject.recipe.expect.get("optimizer")
    if not declared and expected_class is None:
        return [row(subject, _CHECK, Outcome.SKIPPED, "expect declares no optimizer options", cause=Cause.NOT_DECLARED)]
    rows = []
    for phase in subject.phases:
        wrong = _wrong_class(subject, phase, expected_class)
        # A step of the user's own may set the rate itself; where no schedule is declared, step.learning-rate holds the
        # rate that is then in force against the declared one.
        later = {"lr"} if subject.recipe.step is not None and phase.recipe.scheduler is None else set()
        compared = {key: meant for key, meant in declared.items() if key not in later}
        for key, meant in compared.items():
            wrong += _wrong_options(subject, phase, key, meant)
        if not compared and expected_class is None:
            message = "expect declares the learning rate alone, and step.learning-rate judges the one in force"
            wrong = [row(subject, _CHECK, Outcome.SKIPPED, message, cause=Cause.JUDGED_IN_THE_STEP, phase=phase.name)]
        if not wrong:
            keys = ", ".join([*compared, *(["optimizer"] if expected_class else [])])
            wrong = [row(subject, _CHECK, Outcome.PASS, f"{keys} as declared", phase=phase.name)]
        rows += wrong
    return rows


def _wrong_class(subject: Subject, phase: LivePhase, expected: Any) -> list[ResultRow]:
    meant = expected_class_name(expected, phase.name)
    actual = phase.recipe.optimizer.class_path.replace(":", ".").rpartition(".")[2]
    foreign = not phase.recipe.optimizer.class_path.startswith("torch.optim.")
    if meant is None or meant == actual:
        return []
    if foreign:  # it may be declared to follow a known rule; `update.rule` then judges it by that rule
        if not (why := why_not_held_to(subject, phase, meant)):
            return []
        message = f"expect declares that {actual} follows {meant}'s rule, and it cannot be held to that: {why}"
        return [row(subject, _CHECK, Outcome.INCONCLUSIVE, message, phase=phase.name, cause=Cause.NO_REFERENCE_RULE)]
    message = f"the optimizer of phase {phase.name!r} is {actual}, expect declares {meant}"
    return [row(subject, _CHECK, Outcome.FAIL, message, phase=phase.name)]


def _wrong_options(subject: Subject, phase: LivePhase, key: str, meant: Any) -> list[ResultRow]:
    rows = []
    for group in phase.captured.optimizer.groups:
        for name in group.parameters:
            if not isinstance(name, str):
                continue
            expected = declared_option(meant, phase.name, name)
            if expected is None:
                continue
            actual = group.options.get(key)
            started = group.options.get("initial_lr") if key == "lr" else None
            if _equal(actual, expected) or (started is not None and _equal(started, expected)):
                continue
            message = f"{name}: {key} is {actual!r}, expect declares {expected!r}"
            rows.append(row(subject, _CHECK, Outcome.FAIL, message, phase=phase.name, parameter=name,
                            measured=_number(actual), expected=_number(expected)))  # fmt: skip
    return rows


def declared_option(meant: Any, phase: str, name: str) -> Any:
    """Return the value that ``expect`` declares for a parameter: one for all, or by phase, or by the first glob.

    None where nothing is declared for it.
    """
    if isinstance(meant, Mapping) and phase in meant:
        meant = meant[phase]
    if not isinstance(meant, Mapping):
        return meant
    return next((value for glob, value in meant.items() if matches(name, glob)), None)


def _equal(actual: Any, expected: Any) -> bool:
    if isinstance(expected, (list, tuple)) and isinstance(actual, (list, tuple)):
        return len(actual) == len(expected) and all(_equal(a, e) for a, e in zip(actual, expected, strict=True))
    if isinstance(actual, (int, float)) and isinstance(expected, (int, float)):
        return math.isclose(actual, expected, rel_tol=RELATIVE_TOLERANCE)
    return bool(actual == expected)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
