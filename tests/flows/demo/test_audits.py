"""The audit passes the right versions and names what was planted in the others."""

import pytest

from audits import Outcome, audit
from flows.demo.catalogue import DEMO_VERSIONS

BACKBONE = {f"backbone.{layer}.{kind}" for layer in (1, 3) for kind in ("weight", "bias")}

#: Every check that must fail, and the parameters that it must name: these and no others.
PLANTED = {
    "digits-classifier v2": {
        "gradient.finite-difference": {
            f"blocks.{block}.{name}"
            for block in (0, 1)
            for name in ("convolution.weight", "norm.weight", "norm.bias", "activation.scale")
        },
    },
    "digits-gan v2": {
        "update.isolation": {f"generator.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")},
    },
    "char-gpt v2": {"registration.coverage": {"head.weight"}, "registration.stale": {"head.weight"}},
    "frozen-features v2": {"registration.requires-grad": BACKBONE, "update.frozen": BACKBONE},
}


def test_every_planted_bug_is_listed():
    assert set(PLANTED) == {version.label for version in DEMO_VERSIONS if version.planted}


@pytest.mark.slow
@pytest.mark.parametrize("version", DEMO_VERSIONS, ids=lambda version: version.label)
def test_verdict(version, trained):
    result = trained[version.label]
    report = audit(result.model, result.recipe, device="cpu")
    failed = [row for row in report.rows if row.outcome is Outcome.FAIL]
    if version.planted is None:
        assert not failed, [row.message for row in failed]
        assert report.outcome is Outcome.PASS
        assert report.coverage == 1
        return
    assert report.outcome is Outcome.FAIL
    for check, parameters in PLANTED[version.label].items():
        assert {row.parameter for row in failed if row.check == check} == parameters
    healthy = set(dict(result.model.named_parameters())) - set().union(*PLANTED[version.label].values())
    assert not healthy & {row.parameter for row in failed}
    if version.name == "digits-classifier":
        assert "ScaledGelu (blocks.0.activation)" in {row.module for row in failed}
