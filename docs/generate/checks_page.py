"""docs/reference/checks.md: every check, from its declaration."""

from __future__ import annotations

import re
from collections.abc import Iterable

from audits.outcomes import Check
from docs.generate.markdown import plain, table

#: What each family of checks is about; a family that is not here has no section, and `checks_page` fails.
FAMILIES = {
    "gradient": "Is autograd's gradient the derivative of the loss? "
    "[The gradient check](../explanation/gradient_check.md).",
    "registration": "Do the optimizers hold the right tensors, once each, with the declared options? "
    "[The update audit](../explanation/update_audit.md).",
    "step": "Does the training step hand each optimizer the declared loss's gradient?",
    "update": "Does one optimizer step do what the rule says, and nothing else?",
    "optimizer": "Does the optimizer's class follow its rule on synthetic gradients? "
    "[Optimizers](../explanation/optimizers.md).",
    "buffers": "Do running statistics and averaged copies follow the step?",
    "health": "Signs that training suffers. They warn and never fail a version by themselves.",
    "audit": "Did the audit itself run to its end?",
    "model": "Does the version hold the whole model? [Artifact kinds](artifact_kinds.md).",
    "recipe": "Who said how the model is trained? [Own models](../how_to/own_model.md).",
}


def checks_page(checks: Iterable[Check]) -> str:
    """Return every check by family, with all that its declaration says."""
    families: dict[str, list[Check]] = {}
    for check in checks:
        families.setdefault(check.name.partition(".")[0], []).append(check)
    rows = [
        (f"[`{check.name}`](#{_anchor(check.name)})", plain(check.claim), str(check.severity))
        for name in FAMILIES
        for check in families.get(name, ())
    ]
    parts = [
        "# Checks",
        "A check is one claim about a version. Its name never changes its meaning. "
        "`gradaudit explain CHECK` prints the same as this page.",
        "*Severity* is what an unmet claim does to the version: `fail` fails it, `warn` only warns. The setting "
        "`severity` changes it ([configure](../how_to/configure.md)). What to do about a finding: "
        "[fix a failing check](../how_to/fix_a_failing_check.md).",
        table(("check", "claim", "severity"), rows),
    ]
    assert families.keys() == FAMILIES.keys(), f"FAMILIES lacks {families.keys() - FAMILIES.keys()}"
    for name, text in FAMILIES.items():
        parts += [f"## {name}", text]
        for check in families[name]:
            parts += [f"### {check.name}", f"**{plain(check.claim)}**", table(("", ""), _declared(check))]
    return "\n\n".join(parts)


def _declared(check: Check) -> list[tuple[str, str]]:
    texts = {
        name: str(getattr(check, name)) for name in ("severity", "formula", "threshold", "blind_to", "where_to_look")
    }
    return [(name.replace("_", " "), plain(text)) for name, text in texts.items() if text]


def _anchor(heading: str) -> str:
    """Return a heading's anchor as Python-Markdown and GitHub both make it, for names of checks."""
    return re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-")
