"""What a verdict depends on, as digests: what a version's owner can change, and what the whole fleet runs in."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

from audits.errors import RecipeError
from audits.settings import AuditSettings
from audits.short_digests import short_digest
from audits.waivers import Waiver, standing
from flows.settings.environment import GradauditSettings
from flows.team_policy import today, waivers_of
from registry_models.recipes.recipe_sources import matching_digest
from registry_models.registry.versions import RECIPE_TAG, Version

#: Libraries whose own training steps and modules are audited: when one changes, the fleet's sample is audited again.
FRAMEWORKS = ("transformers", "lightning", "pytorch-lightning", "peft", "accelerate")

_DRIVER = Path("/proc/driver/nvidia/version")


def due_key(
    version: Version,
    settings: GradauditSettings,
    audit_settings: AuditSettings,
    *,
    trusted: str | None = None,
    waivers: Sequence[Waiver] | None = None,
) -> str:
    """Return the digest that tells, without a download, whether an owner changed what a verdict depends on."""
    held = standing(waivers_of(settings) if waivers is None else waivers, version.name, version.version, today())
    return digest(
        version.name,
        version.version,
        version.source,
        version.tags.get(RECIPE_TAG, ""),
        audit_settings.digest(),
        trusted_digest(settings, version.name) if trusted is None else trusted,
        *([held] if held else []),
    )


def environment(settings: GradauditSettings) -> str:
    """Return what the whole fleet's verdicts depend on: gradaudit, torch, the frameworks, the device, the driver.

    Of the frameworks those that are installed beside gradaudit, where audits run.
    """
    parts = [f"gradaudit {_installed('gradaudit')}", f"torch {_installed('torch')}"]
    parts += [f"{name} {version}" for name in FRAMEWORKS if (version := _installed(name))]
    parts.append(f"device {settings.device}")
    if driver := driver_version():
        parts.append(f"driver {driver}")
    return ", ".join(parts)


@cache
def driver_version() -> str:
    """Return the NVIDIA kernel driver's version; empty on a host without one."""
    try:
        words = _DRIVER.read_text(encoding="utf-8", errors="replace").split("\n", 1)[0].split()
    except OSError:
        return ""
    return next((word for word in words if word[:1].isdigit() and "." in word), "")


@cache
def _installed(package: str) -> str:
    """The version of an installed package; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def trusted_digest(settings: GradauditSettings, model_name: str) -> str:
    """Return a digest of what the trusted recipe repository says of a model: a verdict depends on it."""
    folder = settings.recipes_folder
    if folder is None:
        return ""
    try:
        return matching_digest(folder, model_name)
    except RecipeError as error:  # a broken file is told by the audit it concerns, it does not stop a sweep
        return f"broken: {error}"


def digest(*parts: object) -> str:
    """Return a short digest of the parts."""
    return short_digest("\0".join(map(str, parts)), 24)
