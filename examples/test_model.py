"""The same as a test: the fixture ``audit`` comes with gradaudit."""

from audit_model import audit_classifier


def test_trains(audit):
    model, recipe = audit_classifier()
    assert audit(model, recipe).passed
