"""The picture's three panels as PNG files, for MLflow's artifact viewer."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

from audits.outcomes import Outcome
from audits.report import AuditReport
from registry_models.report.lines import ParameterLine, parameter_lines
from registry_models.report.text import shortened
from registry_models.untrusted_text import clean

#: Colour, marker and name of an outcome: never told apart by colour alone.
_MARKS = {
    Outcome.SKIPPED: ("#8a929b", ".", "not judged"),
    Outcome.PASS: ("#2f6f8f", "o", "pass"),
    Outcome.WARN: ("#9a6700", "^", "warn"),
    Outcome.INCONCLUSIVE: ("#6a4fa3", "D", "inconclusive"),
    Outcome.FAIL: ("#b42318", "x", "fail"),
}
_INK, _MUTED, _GRID = "#1f2328", "#59636e", "#e6e8eb"

#: Failing tensors that are named in a plot.
_NAMED = 4


def render_plots(report: AuditReport) -> dict[str, bytes]:
    """Return file name -> PNG; a plot with nothing to show is left out."""
    lines = parameter_lines(report.rows, report.coverage_of.unresolved)
    plots = {
        "gradient_norm.png": _plot(lines, "Gradient norm", lambda line: line.gradient_norm, lambda line: line.gradient),
        "gradient_error.png": _plot(
            lines,
            "Relative error of the gradient, over its detection limit",
            lambda line: line.gradient_error,
            lambda line: line.gradient,
            limit=lambda line: line.detection_limit,
        ),
        "update_ratio.png": _plot(lines, "Update / weight", lambda line: line.update_ratio, lambda line: line.update),
    }
    return {name: png for name, png in plots.items() if png is not None}


def _plot(
    lines: Sequence[ParameterLine],
    title: str,
    value: Callable[[ParameterLine], float | None],
    outcome: Callable[[ParameterLine], Outcome | None],
    *,
    limit: Callable[[ParameterLine], float | None] | None = None,
) -> bytes | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = [_drawn(value(line)) for line in lines]
    limits = [_drawn(limit(line)) if limit else None for line in lines]
    positive = [v for v in [*values, *limits] if v]
    if not any(v is not None for v in values):
        return None
    floor = min(positive, default=1.0) / 10
    figure = Figure(figsize=(10, 4), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    # Fixed margins: a layout that is searched for takes as long as the picture itself.
    axes = figure.add_subplot(position=(0.07, 0.14, 0.91, 0.73))
    axes.set_yscale("log")
    if not positive:  # all zero: drawn on the floor
        axes.set_ylim(floor / 10, 1.0)
    if limit is not None:
        _draw_limits(axes, limits, floor)
    _draw_values(axes, values, [outcome(line) or Outcome.SKIPPED for line in lines], floor)
    if any(line.worst is Outcome.FAIL for line in lines):
        # Room for the names above the marks.
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.4)
        _name_failures(axes, lines)
    axes.set_title(title, loc="left", color=_INK, fontsize=12, pad=12)
    at_zero = "; zero is drawn at the bottom" if 0 in values else ""
    axes.set_xlabel(f"{len(lines)} tensors, in the model's order{at_zero}")
    _quieten(axes)
    axes.set_xlim(-0.5, len(lines) - 0.5)
    axes.legend(frameon=False, fontsize=9, ncols=6, loc="lower right", bbox_to_anchor=(1, 1), labelcolor=_MUTED)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _draw_values(axes: Any, values: Sequence[float | None], outcomes: Sequence[Outcome], floor: float) -> None:
    """Draw every value at its tensor's place, by outcome; what is zero lies on the floor."""
    for kind, (colour, marker, name) in _MARKS.items():
        at = [i for i, value in enumerate(values) if value is not None and outcomes[i] is kind]
        if at:
            bad = kind is Outcome.FAIL
            size = (12 if len(values) > 400 else 26) * (2 if bad else 1)
            width = 1.6 if bad else 0.5
            heights = [values[i] or floor for i in at]
            axes.scatter(
                at, heights, s=size, c=colour, marker=marker, linewidths=width, label=name, zorder=3, clip_on=False
            )


def _drawn(value: float | None) -> float | None:
    """A size as it is drawn: what is beyond any picture's axis lies at its end."""
    return value if not value else min(max(abs(value), 1e-100), 1e100)


def _draw_limits(axes: Any, limits: Sequence[float | None], floor: float) -> None:
    """Shade what the check would not have seen."""
    edges = [index - 0.5 for index in range(len(limits) + 1)]
    heights = [limit if limit else float("nan") for limit in limits]
    axes.stairs(heights, edges, baseline=floor, fill=True, color=_GRID, zorder=1)
    axes.stairs(heights, edges, baseline=None, color=_MUTED, linewidth=1, label="detection limit", zorder=2)


def _name_failures(axes: Any, lines: Sequence[ParameterLine]) -> None:
    colour = _MARKS[Outcome.FAIL][0]
    failed = [line for line in lines if line.worst is Outcome.FAIL]
    for position, line in enumerate(failed):
        axes.axvline(line.index, color=colour, linewidth=0.6, alpha=0.35, zorder=0)
        if position < _NAMED:
            right = line.index > 0.6 * len(lines)
            # Names are data: no mathematics in dollars, and only glyphs that the font has.
            name = shortened(clean(line.name), 48).encode("ascii", "replace").decode()
            axes.text(
                line.index,
                0.97 - 0.075 * position,
                f" {name} ",
                transform=axes.get_xaxis_transform(),
                ha="right" if right else "left",
                va="top",
                color=colour,
                fontsize=8.5,
                parse_math=False,
            )


def _quieten(axes: Any) -> None:
    bottom, top = axes.get_ylim()
    if top > 1000 * bottom:
        axes.yaxis.minorticks_off()  # decades are enough, and hundreds of ticks are slow
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_MUTED, labelsize=9)
    axes.xaxis.label.set_color(_MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
