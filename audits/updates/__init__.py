"""The update audit: the right tensors are registered, and a training step does what its rule says and nothing else."""

from __future__ import annotations

from audits.updates.audit import check_registration, check_updates

__all__ = ["check_registration", "check_updates"]
