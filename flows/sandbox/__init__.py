"""How an audit's process is confined: what the host offers, found out by trying, strongest first."""

from flows.sandbox.confinement import Confinement, confine
from flows.sandbox.levels import Level, reached_level
from flows.sandbox.limits import Limits

__all__ = ["Confinement", "Level", "Limits", "confine", "reached_level"]
