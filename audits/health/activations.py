"""Units that are off for a whole batch, and outputs at the flat ends of sigmoids and tanhs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from audits.checks.health import CHANCE, FLAT_END, LAYER_SHARE
from audits.health.health_rows import health_row
from audits.live.subject import LivePhase, Subject
from audits.outcomes import ResultRow
from audits.wording import module_label


@dataclass
class _Activity:
    """Share of dead or saturated units of one module over the loss's forwards."""

    check: str
    dead: torch.Tensor | None = None
    always: torch.Tensor | None = None
    counts: list[float] = field(default_factory=list)

    @property
    def by_chance(self) -> float:
        """Return how likely so many units are off, or more, where each that never changes may as well be always on.

        So it is in a deep narrow net at its start, whose examples look alike: half of its units are off by chance.
        """
        if self.dead is None or self.always is None:
            return 0.0
        off, fixed = int(self.dead.sum()), int((self.dead | self.always).sum())
        return 0.5 * math.erfc((off - 0.5 - fixed / 2) / math.sqrt(fixed / 2)) if fixed else 1.0


class Listener:
    """Counts dead and saturated units of activation modules during a forward."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._found: dict[str, _Activity] = {}
        #: Parameters by the order in which the forward enters the modules that own them.
        self.order: dict[str, None] = {}

    def listening(self) -> _Handles:
        """Return a context in which the forwards are followed."""
        handles = _Handles()
        self.order = {}
        names = {id(p): name for name, p in self._subject.parameters.items()}
        for path, module in self._subject.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks from Python: what runs in it is not seen
            owned = [names[id(p)] for p in module.parameters(recurse=False) if id(p) in names]
            if owned:
                handles.append(module.register_forward_pre_hook(self._entered(owned)))
            if isinstance(module, (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Tanh)):
                handles.append(module.register_forward_hook(self._hook(path)))
        return handles

    def _entered(self, owned: list[str]):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, _: object) -> None:
            self.order.update(dict.fromkeys(owned))

        return hook

    def _hook(self, path: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, _: object, output: torch.Tensor) -> None:
            values = output.detach()
            if not isinstance(values, torch.Tensor) or values.dim() < 2:
                return
            if isinstance(module, (nn.ReLU, nn.ReLU6)):
                on = (values != 0).flatten(0, -2) if values.dim() != 4 else (values != 0).transpose(0, 1).flatten(1).T
                active, always = on.any(0), on.all(0)
                seen = self._found.setdefault(path, _Activity("health.dead-relu"))
                same = seen.dead is not None and seen.dead.shape == active.shape
                seen.dead = (~active & seen.dead) if same else ~active  # type: ignore[operator]
                seen.always = (always & seen.always) if same else always  # type: ignore[operator]
                seen.counts = [float(seen.dead.float().mean())]
            else:
                low, high = (0.0, 1.0) if isinstance(module, nn.Sigmoid) else (-1.0, 1.0)
                flat = ((values - low).abs() < FLAT_END.value) | ((values - high).abs() < FLAT_END.value)
                seen = self._found.setdefault(path, _Activity("health.saturation"))
                seen.counts.append(float(flat.float().mean()))

        return hook

    def rows(self, phase: LivePhase) -> Iterator[ResultRow]:
        """Yield ``health.dead-relu`` and ``health.saturation``, one row a module."""
        for path, seen in self._found.items():
            share = sum(seen.counts) / len(seen.counts)
            what = "units are 0 for the whole batch" if seen.check == "health.dead-relu" else "outputs are at an end"
            module = module_label(type(self._subject.model.get_submodule(path)), path)
            bad = share > LAYER_SHARE.value and seen.by_chance < CHANCE.value
            yield health_row(self._subject, seen.check, bad, f"{path}: {share:.0%} of the {what}",
                       phase=phase.name, module=module, measured=share, threshold=LAYER_SHARE.value)  # fmt: skip


class _Handles(list):
    """Hook handles as a context that removes them."""

    def __enter__(self) -> _Handles:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self:
            handle.remove()
