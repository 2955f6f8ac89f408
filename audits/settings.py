"""What an audit can be told. Reads no environment and no file: callers build it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from audits.checks import refuse_unknown_checks
from audits.checks.gradient import DETECTION_LIMIT
from audits.checks.health import EXPLODING_NORM, RATIO, VANISHING_NORM, VANISHING_RATIO
from audits.checks.severities import refuse_unknown
from audits.errors import SettingsError, suggest, unknown_among
from audits.globs import matches, matching
from audits.short_digests import short_digest

#: How `gradient.finite-difference` is measured.
METHODS = ("auto", "probe", "exact", "elementwise", "gradcheck")

#: Seeds that draws derive from each other by small sums stay within the 64 bits of torch's generators.
SEED_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True)
class AuditSettings:
    """Settings of one audit; the defaults are what the nightly uses.

    Attributes:
        method: ``auto`` takes ``exact`` up to `exact_limit` trainable elements where `torch.func.vmap` holds (up to 256
            elements where it does not) and ``probe`` beyond; ``elementwise`` is the tutorial's loop over every element;
            ``gradcheck`` runs `torch.autograd.gradcheck`.
        seed: seed of every random draw of the audit; the recipe's own when None.
        checks: globs of check names; empty means all.
        parameters: globs of parameter names; empty means all.
        elementwise_epsilon: step of the tutorial's central difference.
        elementwise_tolerance: the tutorial's relative error ``|a - n| / max(|a|, |n|)``.
        exact_limit: most trainable elements for which every element is checked.
        probes: independent probes through all tensors.
        detection_limit: relative error of a tensor's gradient that must be detectable for the tensor to pass.
        input_gradient_limit: most trainable elements for which gradients with respect to the batch are checked too.
        compiled: also run what `torch.compile` compiled and judge its gradients; compiling takes 20 to 60 seconds.
        vanishing_ratio: first/last layer gradient-norm ratio below which gradients count as vanishing ...
        vanishing_norm: ... when the first layer's gradient norm is also below this.
        exploding_norm: gradient norm above which gradients count as exploding.
        update_ratio: update/weight norm ratio above which a step counts as too large.
        severity: glob of check names -> ``fail`` or ``warn``: what an unmet claim does to the version; the last that
            matches counts.
    """

    method: str = "auto"
    seed: int | None = None
    checks: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    elementwise_epsilon: float = 1e-7
    elementwise_tolerance: float = 1e-5
    exact_limit: int = 4096
    probes: int = 2
    detection_limit: float = DETECTION_LIMIT.value
    input_gradient_limit: int = 1_000_000
    compiled: bool = False
    vanishing_ratio: float = VANISHING_RATIO.value
    vanishing_norm: float = VANISHING_NORM.value
    exploding_norm: float = EXPLODING_NORM.value
    update_ratio: float = RATIO.value
    severity: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise SettingsError(
                f"method must be one of {', '.join(METHODS)}, not {self.method!r}{suggest(self.method, METHODS)}"
            )
        for name in ("elementwise_epsilon", "elementwise_tolerance", "detection_limit"):
            if not getattr(self, name) > 0:
                raise SettingsError(f"{name} must be positive, not {getattr(self, name)}")
        if self.seed is not None and not -SEED_LIMIT <= self.seed < SEED_LIMIT:
            raise SettingsError(f"seed must lie between -{SEED_LIMIT} and {SEED_LIMIT}, not be {self.seed}")
        if self.probes < 1:
            raise SettingsError(f"probes must be at least 1, not {self.probes}")
        if self.severity:
            refuse_unknown(self.severity)
        if self.checks:
            refuse_unknown_checks(self.checks)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> AuditSettings:
        """Build settings from plain values, refusing unknown names.

        Raises:
            SettingsError: an unknown setting; the text suggests the nearest.
        """
        known = {known.name for known in dataclasses.fields(cls)}
        if unknown := unknown_among(values, known):
            raise SettingsError(f"unknown audit setting {unknown}")
        tuples: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**tuples)

    @property
    def narrowed(self) -> bool:
        """Whether only some checks or parameters are looked at; such an audit never marks a registry."""
        return bool(self.checks or self.parameters)

    def wants_check(self, *names: str) -> bool:
        """Whether any of these checks was asked for."""
        return not self.checks or bool(matching(names, self.checks))

    def wants_parameter(self, name: str) -> bool:
        """Whether this parameter was asked for."""
        return not self.parameters or matches(name, self.parameters)

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values: what `from_mapping` reads."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}

    def digest(self) -> str:
        """Return a short digest: equal settings, equal digest."""
        return short_digest(json.dumps(self.to_mapping(), sort_keys=True))
