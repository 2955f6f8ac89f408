"""The tensors in the model's order as inline SVG: gradient norm, error over detection limit, update/weight ratio."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from audits.outcomes import Outcome
from audits.signs import SIGNS
from audits.wording import and_more
from registry_models.report.lines import ParameterLine
from registry_models.report.scale import LogScale
from registry_models.report.text import shortened
from registry_models.untrusted_text import clean

WIDTH, LEFT, RIGHT = 1000, 58, 10
PANEL, GAP, TOP, BOTTOM = 132, 48, 84, 34
SPAN = WIDTH - LEFT - RIGHT

#: Failing tensors that are named in the picture.
NAMED = 3

#: With more failing tensors than this their lines would only redden the picture; the crosses remain.
LINED = 60


@dataclass(frozen=True)
class Panel:
    """One stretch of the picture: a title and the value of every tensor."""

    title: str
    values: list[float | None]
    limits: list[float | None] | None
    outcome: Callable[[ParameterLine], Outcome | None]


def picture(lines: Sequence[ParameterLine]) -> Markup | None:
    """Return the picture; None when no tensor has a number to show."""
    panels = [
        Panel("Gradient norm", [line.gradient_norm for line in lines], None, lambda line: line.gradient),
        Panel("Relative error of the gradient, over its detection limit",
              [line.gradient_error for line in lines], [line.detection_limit for line in lines],
              lambda line: line.gradient),
        Panel("Update / weight", [line.update_ratio for line in lines], None, lambda line: line.update),
    ]  # fmt: skip
    scaled = [(panel, LogScale.of([*panel.values, *(panel.limits or ())])) for panel in panels]
    shown = [(panel, scale) for panel, scale in scaled if scale is not None]
    if not shown:
        return None
    height = TOP + len(shown) * (PANEL + GAP) - GAP + BOTTOM
    parts = [_bands(lines, height), _failures(lines, height)]
    for position, (panel, scale) in enumerate(shown):
        parts.append(_panel(panel, scale, lines, TOP + position * (PANEL + GAP)))
    parts.append(f'<path class="cursor" d="M0 {TOP - 6}V{height - BOTTOM}" visibility="hidden"/>')
    label = f"{len(lines)} tensors in the model's order. The table of parameters below holds the same numbers."
    return Markup(
        f'<svg id="picture-svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}" tabindex="0" '
        f'data-left="{LEFT}" data-span="{SPAN}" data-count="{len(lines)}">{"".join(parts)}</svg>'
    )


def _x(index: int, count: int) -> float:
    return LEFT + (index + 0.5) * SPAN / count


def _bands(lines: Sequence[ParameterLine], height: int) -> str:
    """Alternating bands, one per part of the network, named below where there is room."""
    runs: list[tuple[str, int, int]] = []
    for line in lines:
        if runs and runs[-1][0] == line.group:
            runs[-1] = (line.group, runs[-1][1], line.index + 1)
        else:
            runs.append((line.group, line.index, line.index + 1))
    width = SPAN / len(lines)
    parts = []
    for position, (group, start, end) in enumerate(runs):
        x, span = LEFT + start * width, (end - start) * width
        if position % 2:
            parts.append(f'<path class="band" d="M{x:.1f} {TOP - 6}h{span:.1f}V{height - BOTTOM + 2}h-{span:.1f}z"/>')
        room = int(span / 7.5)
        name = clean(group)
        short = name if len(name) <= room else ".".join(name.split(".")[-2:])
        if room >= min(3, len(short)):
            text = escape(shortened(short, max(3, room)))
            parts.append(f'<text class="group" x="{x + span / 2:.1f}" y="{height - 10}">{text}</text>')
    return "".join(parts)


def _failures(lines: Sequence[ParameterLine], height: int) -> str:
    """A line through all panels for every failing tensor; the first ones by name."""
    failed = [line for line in lines if line.worst is Outcome.FAIL]
    if not failed:
        return ""
    parts = []
    if len(failed) <= LINED:
        path = "".join(f"M{_x(line.index, len(lines)):.1f} {TOP - 10}V{height - BOTTOM}" for line in failed)
        parts.append(f'<path class="failing" d="{path}"/>')
    for position, line in enumerate(failed[:NAMED]):
        x, y = _x(line.index, len(lines)), 13 + 14 * (NAMED - 1 - position)
        end = x > LEFT + SPAN * 0.6
        more = and_more(len(failed) - NAMED) if position == NAMED - 1 else ""
        text = escape(shortened(clean(line.name), 48))
        if len(failed) <= LINED:
            parts.append(f'<path class="failing" d="M{x:.1f} {y + 4}V{TOP - 10}"/>')
        parts.append(
            f'<text class="named{" end" if end else ""}" '
            f'x="{x + (-5 if end else 5):.1f}" y="{y + 4}">{f"{SIGNS[Outcome.FAIL]} {text} {more}".rstrip()}</text>'
        )
    return "".join(parts)


def _panel(panel: Panel, scale: LogScale, lines: Sequence[ParameterLine], top: float) -> str:
    bottom = top + PANEL

    def y(value: float) -> float:
        return bottom - scale.share(value) * PANEL

    parts = [f'<text class="title" x="{LEFT}" y="{top - 12}">{panel.title}</text>']
    for share, label in scale.ticks():
        at = bottom - share * PANEL
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}h{SPAN}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}">{label}</text>')
    if panel.limits is not None:
        parts.append(_limits(panel.limits, y, bottom))
    count = len(lines)
    marks: dict[Outcome, list[str]] = {}
    small = count > 400
    for line, value in zip(lines, panel.values, strict=True):
        if value is None:
            continue
        outcome = panel.outcome(line) or Outcome.SKIPPED
        marks.setdefault(outcome, []).append(_mark(outcome, _x(line.index, count), y(value), small=small))
    order = (Outcome.SKIPPED, Outcome.PASS, Outcome.WARN, Outcome.INCONCLUSIVE, Outcome.FAIL)
    size = " small" if small else ""
    parts += [f'<path class="mark {o}{size}" d="{"".join(marks[o])}"/>' for o in order if o in marks]
    return "".join(parts)


def _limits(limits: Sequence[float | None], y: Callable[[float], float], bottom: float) -> str:
    """What lies below a tensor's detection limit, shaded; a tensor without a limit stays blank."""
    width = SPAN / len(limits)
    area, edge = [], []
    for index, limit in enumerate(limits):
        if limit is None:
            continue
        x, at = LEFT + index * width, y(limit)
        area.append(f"M{x:.1f} {bottom:.1f}V{at:.1f}h{width:.2f}V{bottom:.1f}")
        edge.append(f"M{x:.1f} {at:.1f}h{width:.2f}")
    return f'<path class="unseen" d="{"".join(area)}"/><path class="limit" d="{"".join(edge)}"/>'


def _mark(outcome: Outcome, x: float, y: float, *, small: bool) -> str:
    """One mark; the shape alone tells the outcome."""
    r = 3.2 if small else 4.5
    match outcome:
        case Outcome.FAIL:
            return f"M{x - r:.1f} {y - r:.1f}l{2 * r:g} {2 * r:g}m0 {-2 * r:g}l{-2 * r:g} {2 * r:g}"
        case Outcome.WARN:
            return f"M{x:.1f} {y - r:.1f}l{r:g} {1.8 * r:g}h{-2 * r:g}z"
        case Outcome.INCONCLUSIVE:
            return f"M{x:.1f} {y - r:.1f}l{r:g} {r:g}l{-r:g} {r:g}l{-r:g} {-r:g}z"
        case _:
            return f"M{x:.1f} {y:.1f}h0"
