"""Models of a Python file, audited without a registry: functions ``audit_...`` that return model and recipe."""
