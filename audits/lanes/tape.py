"""Random draws recorded once and played back, cast, in every evaluation and lane.

At equal seed ``randn`` (16 elements and more), ``rand`` and ``bernoulli`` differ between dtypes, so a seed alone does
not make two lanes the same function. The operators are listed by name: torch's tag ``nondeterministic_seeded`` also
marks fused attention, whose taped output would freeze the attention itself.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch

from audits.devices import default_generator_state
from audits.lanes.lifting import traits

#: Operators whose whole result is noise: taped as it is.
DRAWING = frozenset(
    {
        "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "normal", "uniform",
        "bernoulli", "exponential", "cauchy", "log_normal", "geometric", "random", "multinomial", "poisson", "binomial",
        "normal_functional",
    }
)  # fmt: skip

#: Operators that mix noise with their input; the noise, not the result, is taped.
MIXING = frozenset({"native_dropout", "rrelu_with_noise", "_fused_dropout"})

#: Reparametrised draws: the draw is taped, and its derivative follows the implicit gradient around the taped point.
IMPLICIT = frozenset({"_standard_gamma", "_sample_dirichlet"})


_RANDOM = DRAWING | MIXING | IMPLICIT


@functools.cache
def may_draw(func: Any) -> bool:
    """Whether the operator is one that draws."""
    return traits(func).base in _RANDOM


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws random numbers that the tape knows how to play back."""
    return may_draw(func) and (traits(func).base != "rrelu_with_noise" or _training(args, kwargs))


@dataclass
class Tape:
    """Noise in the order it was drawn, and by the generator's state for forwards that checkpointing runs again."""

    draws: list[tuple[str, Any]] = field(default_factory=list)
    by_state: dict[tuple[str, bytes], Any] = field(default_factory=dict)

    def cursor(self, *, recording: bool = False, strict: bool = False) -> TapeCursor:
        """Start at the beginning.

        Args:
            recording: put what is new on the tape, and index all draws by the generator's state. Without it the tape
                stays as it is, whatever is drawn.
            strict: a draw that is not on the tape raises `NotOnTapeError`.
        """
        return TapeCursor(self, recording=recording, strict=strict)


class NotOnTapeError(RuntimeError):
    """An evaluation that has to play draws back drew something else: vmap takes a fused dropout apart, say."""


class TapeCursor:
    """One pass over a tape: plays back while the draws are those of the tape, and may record what is new."""

    def __init__(self, tape: Tape, *, recording: bool, strict: bool) -> None:
        self._tape = tape
        self._strict = strict
        self._position = 0
        self._recording = recording
        #: In a backward pass checkpointing runs forwards again: then only the generator's state tells which draw it is.
        self.by_state_only = False

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a random operator: the generator advances as ever, the values come from the tape."""
        known = traits(func)
        state = _state_key(known.base, args, kwargs) if self._recording or self.by_state_only else None
        before = args[0].clone() if known.base in MIXING | IMPLICIT else None
        result = func(*args, **kwargs)
        if self.by_state_only:
            noise = self._tape.by_state.get(state) if state is not None else None
        else:
            noise = self._next(known.base, result, args)
        if noise is None:
            noise = _noise_of(known.base, before, args, result)
            if self._recording and not self.by_state_only:
                self._tape.draws.append((known.base, noise))
                self._position = len(self._tape.draws)
        if state is not None and not self.by_state_only:
            self._tape.by_state[state] = noise
        return _apply(known.base, noise, before, args, kwargs, result)

    def _next(self, base: str, result: Any, args: tuple[Any, ...]) -> Any:
        if self._position >= len(self._tape.draws):
            self._is_new(base)
            return None
        name, noise = self._tape.draws[self._position]
        shape = _noise_of(base, None, args, result, shape_only=True)
        if name != base or (noise.shape[1:] if base in IMPLICIT else noise.shape) != shape:
            self._is_new(base)
            if self._recording:  # the lane draws something else than the native run did: from here on it has its own
                del self._tape.draws[self._position :]
            self._position = len(self._tape.draws)
            return None
        self._position += 1
        return noise

    def _is_new(self, base: str) -> None:
        if self._strict:
            raise NotOnTapeError(f"{base} is not what the tape has at draw {self._position}")


def _state_key(base: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str, bytes]:
    generator = kwargs.get("generator")
    device = next((a.device for a in args if isinstance(a, torch.Tensor)), torch.device(kwargs.get("device") or "cpu"))
    state = default_generator_state(device) if generator is None else generator.get_state()
    return base, state.numpy().tobytes()


def _noise_of(base: str, before: Any, args: tuple[Any, ...], result: Any, *, shape_only: bool = False) -> Any:
    if base == "rrelu_with_noise":
        noise = args[1]
    elif base in ("native_dropout", "_fused_dropout"):
        noise = result[1]
    else:
        noise = result
    if shape_only:
        return noise.shape
    if base in IMPLICIT:
        return torch.stack([noise.detach().double(), before.detach().double()])
    return noise.detach().clone()


def _apply(base: str, noise: Any, before: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
    if base == "rrelu_with_noise":
        args[1].copy_(noise)
        if result is args[0]:
            return result.copy_(before * noise)
        return before * noise.to(before.dtype)
    if base in ("native_dropout", "_fused_dropout"):
        probability = args[1] if base == "native_dropout" else 1 - args[1]
        keep = 1.0 - probability
        scale = 0.0 if keep == 0 else 1.0 / keep
        return before * noise.to(before.dtype) * scale, noise
    if base == "_standard_gamma":
        sample, at = noise
        slope = torch._standard_gamma_grad(at, sample)
        return (sample + slope * (before - at)).to(result.dtype)
    if base == "_sample_dirichlet":
        sample, at = noise
        total = at.sum(-1, keepdim=True).expand_as(at)
        shift = torch._dirichlet_grad(sample, at, total) * (before - at)
        return (sample + shift - sample * shift.sum(-1, keepdim=True)).to(result.dtype)
    if _in_place(args, result):
        args[0].copy_(noise)
        return args[0]
    return noise.to(result.dtype).clone()


def _in_place(args: tuple[Any, ...], result: Any) -> bool:
    return bool(args) and result is args[0]


def _training(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return bool(kwargs.get("training", args[4] if len(args) > 4 else False))
