"""LBFGS, which calls its closure: judged on the losses and gradients that it was given, played back in float64."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from audits.causes import Cause
from audits.live.subject import LivePhase, Subject
from audits.outcomes import Lane, Outcome, ResultRow
from audits.recipe.optimizers import build_optimizer, placed_state
from audits.recipe.phases import OptimizerRecipe, ParameterGroup
from audits.structures import map_tensors
from audits.updates.compare import deviation, rms
from audits.updates.judge.expected import LOW_PRECISION
from audits.updates.record.calls import Call
from audits.updates.rules.lbfgs import SEARCH_THRESHOLD, THRESHOLD, Evaluate, Memory, lbfgs_step
from audits.updates.update_rows import norm, row

#: The native update against the reference over the same gradients: directions are differences of rounded gradients,
#: so a native step is only held to be the same step, not the same digits.
SAME_STEP = 0.1

#: Curvature pairs are differences of close gradients, and their rounding can be blown up without bound: where an error
#: exceeds the threshold it may be so many times the rule's own response to gradients that are off by one eps.
ROUNDINGS = 8.0

#: Draws of that response.
DRAWS = 3

#: Share of the whole update's rms that counts as a parameter's own size.
FLOOR = 0.01

#: Outer steps of the synthetic problem: with captured pairs from the second on.
OUTER_STEPS = 8


class PlaybackExhaustedError(Exception):
    """The float64 run asked for more evaluations than the native one made: it decided otherwise on the way."""


class ClosureJudge:
    """Judges the calls of a phase whose optimizer is torch's LBFGS.

    Args:
        subject: the model under audit.
        phase: the phase.
    """

    def __init__(self, subject: Subject, phase: LivePhase) -> None:
        self._subject = subject
        self._phase = phase
        names = list(dict.fromkeys(phase.recipe.optimizer.names))
        captured = phase.recipe.optimizer.state
        held = next((n for n in names if n in captured), None)
        self._captured = {} if held is None else dict(captured[held])
        if held is not None:
            self._captured = map_tensors(self._captured, lambda t: t.to(subject.parameters[held].device))
        self._names = names
        self._memory = Memory.of(self._captured)
        self._lane: _Lane | None = None
        self._calls: list[Call] = []

    def rows(self, call: Call) -> Iterator[ResultRow]:
        """Yield one ``update.rule`` row per parameter."""
        before = _flat(call.before, self._names)
        self._calls.append(call)
        if self._lane is None:
            self._lane = _Lane(self._phase.recipe.optimizer, call, self._names, self._captured)
        options = next(iter(call.options.values()))
        threshold = SEARCH_THRESHOLD if options.get("line_search_fn") else THRESHOLD
        wanted = [n for n in self._names if self._subject.settings.wants_parameter(n)]
        try:
            reference = lbfgs_step(before, self._playback(call), self._memory, options) - before
            in_lane = self._lane.step(call) - before
        except PlaybackExhaustedError:
            for name in wanted:
                message = f"{name}: in float64 LBFGS takes other decisions in step {call.step} than it took natively"
                yield self._row(Outcome.INCONCLUSIVE, message, call, name, cause=Cause.UNRESOLVED)
            return
        parts = [_split(v, call, self._names) for v in (reference, in_lane, before)]
        for name in wanted:
            expected, lane, theta = (part[name] for part in parts)
            actual = call.moved(name).double() - call.before[name].double()
            error = deviation(lane, expected, theta, torch.float64).l2
            # A bias before BatchNorm moves by rounding alone: its size is its neighbours'.
            apart = (
                rms(actual - expected) / (rms(expected) + FLOOR * rms(reference)) if rms(reference) else norm(actual)
            )
            allowed = threshold
            if error > threshold:
                allowed = max(threshold, ROUNDINGS * self._response(name, expected, theta))
            numbers: dict[str, Any] = {"measured": norm(actual), "expected": norm(expected), "error": error,
                                       "threshold": allowed, "update_norm": norm(expected), "lane": Lane.FLOAT64,
                                       "parameter_norm": norm(theta)}  # fmt: skip
            if allowed == float("inf"):
                message = f"{name}: how far LBFGS goes in step {call.step} is decided by rounding: it cannot be judged"
                yield self._row(Outcome.INCONCLUSIVE, message, call, name, cause=Cause.UNRESOLVED, **numbers)
            elif error <= allowed and apart > SAME_STEP and call.before[name].dtype in LOW_PRECISION:
                message = (f"{name} moved otherwise than LBFGS's rule says (step {call.step}, {apart:.2g} relative), "
                           f"and {call.before[name].dtype} is too coarse for it: the same build follows it in float64 "
                           "on the same gradients")  # fmt: skip
                yield self._row(Outcome.INCONCLUSIVE, message, call, name, cause=Cause.PRECISION, **numbers)
            elif error > allowed or apart > SAME_STEP:
                message = (f"{name} did not move as LBFGS's rule says (step {call.step}): error {error:.3g} against "
                           f"{allowed:g} in float64, {apart:.2g} relative natively")  # fmt: skip
                yield self._row(Outcome.FAIL, message, call, name, **numbers)
            else:
                message = f"{name} moved as LBFGS's rule says (step {call.step}, the same gradients in float64)"
                yield self._row(Outcome.PASS, message, call, name, **numbers)

    def _response(self, name: str, expected: torch.Tensor, theta: torch.Tensor) -> float:
        """Return how far, in eps, the last step's rule moves a parameter otherwise when gradients round otherwise."""
        options = next(iter(self._calls[-1].options.values()))
        worst = 0.0
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            memory = Memory.of(self._captured)
            try:
                for call in self._calls:
                    before = _flat(call.before, self._names)
                    moved = lbfgs_step(before, shaken(self._playback(call), generator), memory, options) - before
            except PlaybackExhaustedError:  # rounding decides how far it goes
                return float("inf")
            other = _split(moved, self._calls[-1], self._names)[name]
            worst = max(worst, deviation(other, expected, theta, torch.float64).l2)
        return worst

    def _playback(self, call: Call) -> Evaluate:
        answers = iter(call.evaluations)

        def evaluate(theta: torch.Tensor) -> tuple[float, torch.Tensor]:
            _, loss, gradients = _next(answers)
            return loss, _flat_gradients(gradients, call, self._names)

        return evaluate

    def _row(self, outcome: Outcome, message: str, call: Call, name: str, **fields: Any) -> ResultRow:
        return row(self._subject, "update.rule", outcome, message, phase=self._phase.name, step=call.step,
                   parameter=name, **fields)  # fmt: skip


class _Lane:
    """The very build on float64 copies, given the recorded answers."""

    def __init__(self, recipe: OptimizerRecipe, call: Call, names: list[str], state: Any) -> None:
        self._names = names
        self._copies = {n: nn.Parameter(call.before[n].to(torch.float64, copy=True)) for n in names}
        self._optimizer = build_optimizer(recipe, self._copies, with_state=False, fresh=not state, hooks=False)
        if state:
            placed = placed_state(state, self._copies[names[0]], self._optimizer)
            self._optimizer.state[self._copies[names[0]]] = map_tensors(placed, lambda t: t.double())

    def step(self, call: Call) -> torch.Tensor:
        """Return the flat weights after a step from the call's weights."""
        answers = iter(call.evaluations)
        for name, copy in self._copies.items():
            copy.data.copy_(call.before[name])

        def closure() -> float:
            _, value, gradients = _next(answers)
            for name, copy in self._copies.items():
                gradient = gradients[name]
                copy.grad = None if gradient is None else gradient.to_dense().double()
            return float(value)

        self._optimizer.step(closure)
        return _flat(self._copies, self._names)


def shaken(evaluate: Evaluate, generator: torch.Generator) -> Evaluate:
    """Return the function with gradients that are off by one eps of float64."""

    def other(theta: torch.Tensor) -> tuple[float, torch.Tensor]:
        loss, gradient = evaluate(theta)
        signs = torch.randint(0, 2, gradient.shape, generator=generator).to(gradient.device, torch.float64) * 2 - 1
        return loss, gradient * (1 + torch.finfo(torch.float64).eps * signs)

    return other


def _next(answers: Iterator[Any]) -> Any:
    found = next(answers, None)
    if found is None:
        raise PlaybackExhaustedError
    return found


def _flat(values: Any, names: list[str]) -> torch.Tensor:
    return torch.cat([values[n].detach().double().reshape(-1) for n in names])


def _flat_gradients(gradients: dict[str, torch.Tensor | None], call: Call, names: list[str]) -> torch.Tensor:
    found = [(gradients[n], call.before[n]) for n in names]
    return torch.cat([(torch.zeros_like(p) if g is None else g.to_dense()).double().reshape(-1) for g, p in found])


def _split(flat: torch.Tensor, call: Call, names: list[str]) -> dict[str, torch.Tensor]:
    pieces = flat.split([call.before[n].numel() for n in names])
    return {n: piece.view(call.before[n].shape) for n, piece in zip(names, pieces, strict=True)}


def closure_probe_rows(subject: Subject, phase: LivePhase, seed: int) -> list[ResultRow]:
    """Return ``optimizer.probe`` and ``registration.state-round-trip`` on a synthetic quartic, in float64."""
    common: dict[str, Any] = {"phase": phase.name, "lane": Lane.SYNTHETIC}
    generator = torch.Generator().manual_seed(seed)
    problem = _Quartic(generator, subject.device)
    group = phase.recipe.optimizer.groups[0]
    recipe = OptimizerRecipe(phase.recipe.optimizer.class_path, phase.recipe.optimizer.defaults,
                             (ParameterGroup(group.options, ("synthetic.0", "synthetic.1")),),
                             live_class=phase.recipe.optimizer.live_class)  # fmt: skip
    going, loaded = problem.build(recipe), problem.build(recipe)
    memory, worst, apart, response = Memory.of({}), 0.0, False, 0.0
    others = [(Memory.of({}), torch.Generator().manual_seed(draw)) for draw in range(DRAWS)]
    for number in range(1, OUTER_STEPS + 1):
        before = going.theta()
        reference = lbfgs_step(before, problem.evaluate, memory, group.options) - before
        for kept, draws in others:
            moved = lbfgs_step(before, shaken(problem.evaluate, draws), kept, group.options) - before
            response = max(response, deviation(moved, reference, before, torch.float64).l2)
        going.optimizer.step(going.closure)
        worst = max(worst, deviation(going.theta() - before, reference, before, torch.float64).l2)
        if number > OUTER_STEPS // 2:
            loaded.optimizer.step(loaded.closure)
            apart = apart or not torch.equal(loaded.theta(), going.theta())
        elif number == OUTER_STEPS // 2:
            with io.BytesIO() as file:
                torch.save(going.optimizer.state_dict(), file)
                file.seek(0)
                loaded.optimizer.load_state_dict(torch.load(file, weights_only=False))
            for copy, parameter in zip(loaded.parameters.values(), going.parameters.values(), strict=True):
                copy.data.copy_(parameter.data)
    threshold = SEARCH_THRESHOLD if group.options.get("line_search_fn") else THRESHOLD
    threshold = max(threshold, ROUNDINGS * response)
    met = worst <= threshold
    text = "follows" if met else "leaves"
    return [
        row(subject, "optimizer.probe", Outcome.PASS if met else Outcome.FAIL,
            f"LBFGS {text} its rule over {OUTER_STEPS} steps on a synthetic quartic", error=worst, threshold=threshold,
            **common),
        row(subject, "optimizer.parity", Outcome.SKIPPED, "LBFGS has one implementation", cause=Cause.PLAIN_LOOP,
            **common),
        row(subject, "registration.state-round-trip", Outcome.FAIL if apart else Outcome.PASS,
            "saved, loaded and stepped " + ("differs from stepped" if apart else "equals stepped, bit for bit"),
            measured=float(apart), expected=0.0, **common),
    ]  # fmt: skip


class _Quartic:
    """``f(x) = x.A x / 2 - b.x + sum x^4 / 4``, A positive definite with condition 30."""

    SIZE = 19

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        basis = torch.linalg.qr(torch.randn(self.SIZE, self.SIZE, dtype=torch.float64, generator=generator)).Q
        scales = torch.diag(torch.linspace(0.1, 3.0, self.SIZE, dtype=torch.float64))
        self._a = (basis @ scales @ basis.T).to(device)
        self._b = torch.randn(self.SIZE, dtype=torch.float64, generator=generator).to(device)
        self.start = torch.randn(self.SIZE, dtype=torch.float64, generator=generator).to(device)

    def evaluate(self, x: torch.Tensor) -> tuple[float, torch.Tensor]:
        ax = self._a @ x
        return float(x @ ax / 2 - self._b @ x + (x**4).sum() / 4), ax - self._b + x**3

    def build(self, recipe: OptimizerRecipe) -> _QuarticRun:
        return _QuarticRun(self, recipe)


class _QuarticRun:
    def __init__(self, problem: _Quartic, recipe: OptimizerRecipe) -> None:
        pieces = problem.start[:7].clone(), problem.start[7:].clone().view(3, 4)
        self.parameters = {f"synthetic.{i}": nn.Parameter(piece) for i, piece in enumerate(pieces)}
        self.optimizer = build_optimizer(recipe, self.parameters, with_state=False, hooks=False)
        self._problem = problem
        self.closure: Callable[[], float] = self._evaluate

    def theta(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters.values()])

    def _evaluate(self) -> float:
        loss, gradient = self._problem.evaluate(self.theta())
        self.parameters["synthetic.0"].grad = gradient[:7].clone()
        self.parameters["synthetic.1"].grad = gradient[7:].clone().view(3, 4)
        return loss
