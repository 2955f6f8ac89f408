"""docs/reference/checks.md: every check, from its declaration."""

from __future__ import annotations

import re
from collections.abc import Iterable

from audits import checks as declared
from audits.checks.check import Check
from audits.outcomes import Family
from docs.generate.markdown import code, plain, table

#: What each family of checks is about, in the page's order.
FAMILIES = {
    Family.GRADIENT: "Is autograd's gradient the derivative of the loss? "
    "[The gradient check](../explanation/gradient_check.md).",
    Family.REGISTRATION: "Do the optimizers hold the right tensors, once each, with the declared options? "
    "[The update audit](../explanation/update_audit.md).",
    Family.STEP: "Does the training step hand each optimizer the declared loss's gradient?",
    Family.UPDATE: "Does one optimizer step do what the rule says, and nothing else?",
    Family.OPTIMIZER: "Does the optimizer's class follow its rule on synthetic gradients? "
    "[Optimizers](../explanation/optimizers.md).",
    Family.BUFFERS: "Do running statistics and averaged copies follow the step?",
    Family.HEALTH: "Signs that training suffers. They warn, and never fail a version by themselves.",
    Family.AUDIT: "Did the audit itself run to its end?",
    Family.MODEL: "Does the version hold the whole model? [Artifact kinds](artifact_kinds.md).",
    Family.RECIPE: "Who said how the model is trained? [Own models](../how_to/own_model.md).",
}


def checks_page(checks: Iterable[Check]) -> str:
    """Return every check by family, with all that its declaration says."""
    families: dict[Family, list[Check]] = {}
    for check in checks:
        families.setdefault(check.family, []).append(check)
    assert families.keys() == FAMILIES.keys() == set(Family)
    rows = [
        (f"[`{check.name}`](#{_anchor(check.name)})", plain(check.claim), str(check.severity))
        for family in FAMILIES
        for check in families[family]
    ]
    parts = [
        "# Checks",
        "A check is one claim about a version. Its name never changes its meaning. "
        "`gradaudit explain CHECK` prints the same as this page, with the thresholds that your settings put in force.",
        "*Severity* is what an unmet claim does to the version: `fail` fails it, `warn` only warns. The setting "
        "`severity` changes it ([configure](../how_to/configure.md)). What to do about a finding: "
        "[fix a failing check](../how_to/fix_a_failing_check.md).",
        table(("check", "claim", "severity"), rows),
    ]
    for family, text in FAMILIES.items():
        parts += [f"## {family}", f"{text} Declared in `{_file(families[family][0])}`."]
        for check in families[family]:
            parts += [f"### {check.name}", f"**{plain(check.claim)}**", table(("", ""), _texts(check))]
            parts += _numbers(check)
    return "\n\n".join(parts)


def _texts(check: Check) -> list[tuple[str, str]]:
    texts = {
        "severity": str(check.severity),
        "formula": check.formula,
        "threshold": check.threshold(),
        "blind to": check.blind_to,
        "where to look": check.where_to_look,
    }
    return [(name, plain(text)) for name, text in texts.items() if text]


def _numbers(check: Check) -> list[str]:
    """Return the table of a check's numbers, with the settings where one can be set; nothing where there is none."""
    rows = [(plain(one.text()), plain(one.source), code(one.setting)) for one in check.thresholds]
    columns = 3 if any(one.setting for one in check.thresholds) else 2
    head = ("number", "where it comes from", "setting")[:columns]
    return [table(head, [row[:columns] for row in rows])] if rows else []


def _file(check: Check) -> str:
    """Return the file that declares a check."""
    module = next(module for module in declared._FAMILIES if check in module.CHECKS)
    return f"{module.__name__.replace('.', '/')}.py"


def _anchor(heading: str) -> str:
    """Return a heading's anchor as Python-Markdown and GitHub both make it, for names of checks."""
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
