"""Which audit a row belongs to. Apart from the tables' format, so that an audit's process comes without Arrow."""

from __future__ import annotations

import dataclasses
import datetime


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditIdentity:
    """Which audit a row belongs to: the columns all rows of one audit share."""

    audit_id: str = ""
    audited_at: datetime.datetime = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC))
    model_name: str = ""
    model_version: int | None = None
    model_digest: str = ""
    recipe_digest: str = ""
    settings_digest: str = ""
    torch: str = ""
    device: str = ""
    driver: str = ""
    artifact_kind: str = "live"
    isolation: str = "in-process"
