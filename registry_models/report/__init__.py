"""Reports a person reads: one self-contained HTML page, plots as PNG, a note in markdown. Knows no MLflow."""

from __future__ import annotations

from registry_models.report.changes import Change, Changes, changes_of
from registry_models.report.note import render_markdown
from registry_models.report.plots import render_plots
from registry_models.report.rendering import render_html

__all__ = ["Change", "Changes", "changes_of", "render_html", "render_markdown", "render_plots"]
