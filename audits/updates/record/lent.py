"""Gradients and state that a recorded step is judged by without a copy: as long as nobody wrote there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from audits.live.subject import LivePhase, Subject
from audits.recipe.lone_optimizers import foreign_global_hooks
from audits.recipe.moulds import STEP_HOOKS, own_step
from audits.structures import map_tensors, tensors_in
from audits.updates.record.calls import Call
from audits.updates.record.shelf import Shelf, snapshot_of

#: The number of writes that torch counted, and the sum over a tensor's bits.
Mark = tuple[int, int]

#: Integers as wide as an element.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

#: Elements that are added up at a time.
_PIECE = 2**22


def lendable(tensor: torch.Tensor) -> bool:
    """Whether a sum over its bits shows what was written: a dense tensor of torch's own class."""
    own = type(tensor) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and not tensor.is_quantized
    size = tensor.element_size() // 2 if tensor.is_complex() else tensor.element_size()
    return own and tensor.layout is torch.strided and size in _INTEGERS


def _marks(tensors: Sequence[torch.Tensor]) -> list[Mark]:
    """Return a mark of each tensor; their sums are read in one synchronisation a device."""
    sums: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for position, tensor in enumerate(tensors):
        plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
        total = _sum_of_bits(plain.detach().reshape(-1))
        sums.setdefault(total.device, []).append((position, total))
    found = [0] * len(tensors)
    for of_device in sums.values():
        numbers = torch.stack([total for _, total in of_device]).tolist()
        for (position, _), number in zip(of_device, numbers, strict=True):
            found[position] = number
    return [(tensor._version, number) for tensor, number in zip(tensors, found, strict=True)]


def _sum_of_bits(flat: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor's 64-bit words, modulo 2^64, on its device; what is left over counts by itself.

    Whole words add up ten times as fast as float32's integers, which are widened first.
    """
    each = 8 // flat.element_size()
    aligned = flat.storage_offset() % each == 0
    whole = flat.numel() // each * each if aligned else 0
    rest = flat[whole:].view(_INTEGERS[flat.element_size()])
    parts = [part.sum(dtype=torch.int64) for part in rest.split(_PIECE)]
    if whole:
        parts.append(flat[:whole].view(torch.int64).sum())
    return torch.stack(parts).sum()


class Lending:
    """Which calls are recorded without copies, and whether that went well.

    torch counts the writes to a tensor, but for those through its ``.data``, which a sum over its bits shows. Where one
    was written to after all (a second zero_grad, a kernel that uses the gradient as its scratch paper), the run is no
    good and is made again with copies.

    Args:
        subject: the model under audit.
        owned: whether a phase's optimizer is torch's own code, which nobody else writes for; None lends nothing.
    """

    def __init__(self, subject: Subject, owned: Callable[[LivePhase], bool] | None) -> None:
        self._subject, self._owned = subject, owned
        self._gradients: list[tuple[Call, str, torch.Tensor, Mark]] = []
        self._states: list[tuple[Call, torch.Tensor, Mark]] = []
        self.spoilt = False

    def state(self, call: Call, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a call's state may be the optimizer's own: torch's, dense, nothing of the user's around it."""
        bare = own_step(optimizer) is None and all(len(getattr(optimizer, place)) <= 2 for place in STEP_HOOKS.values())
        quiet = bare and not foreign_global_hooks() and not call.in_backward
        if not quiet or self._owned is None or not self._owned(call.phase):
            return False
        return all(lendable(t) for state in optimizer.state.values() for _, t in tensors_in(state))

    def gradients(self, call: Call, optimizer: torch.optim.Optimizer) -> bool:
        """Whether a call's gradients may be the parameters' own; another phase's backward would add to them."""
        return self.state(call, optimizer) and len(self._subject.phases) == 1 and self._subject.device.type == "cpu"

    def lend_gradient(self, call: Call, name: str, gradient: torch.Tensor) -> None:
        """Note a gradient that was lent."""
        self._gradients.append((call, name, gradient, _marks([gradient])[0]))

    def lend_state(self, call: Call) -> None:
        """Note a state that was lent."""
        shelf = call.state_after
        raw = [shelf.raw(name) if isinstance(shelf, Shelf) else shelf[name] for name in shelf]
        lent = [tensor for _, tensor in tensors_in(raw)]
        self._states += [(call, tensor, mark) for tensor, mark in zip(lent, _marks(lent), strict=True)]

    def look(self) -> None:
        """See whether anything that is lent was written to."""
        lent = [(t, mark) for *_, t, mark in self._gradients] + [(t, mark) for _, t, mark in self._states]
        if not self.spoilt:
            self.spoilt = _marks([tensor for tensor, _ in lent]) != [mark for _, mark in lent]

    def take_back_gradients(self) -> None:
        """Copy the lent gradients that are still in their parameters: the next backward may add to them."""
        for call, name, gradient, _ in self._gradients:
            present = self._subject.parameters[name].grad
            if present is None or present.data_ptr() != gradient.data_ptr():
                continue
            copy = gradient.clone()
            reference = getattr(getattr(call.note, "reference", None), "gradients", None)
            for shelf in (call.gradients, call.handed, reference):
                if isinstance(shelf, Shelf) and name in shelf and shelf.raw(name) is gradient:
                    shelf.put(name, copy)
        self._gradients = []

    def take_back_states(self, phase: str | None = None) -> None:
        """Copy the lent states (of one phase): its optimizer steps again. Without a phase they were judged: let go."""
        for call in {id(c): c for c, _, _ in self._states if phase is not None and c.phase.name == phase}.values():
            own: Shelf[dict[str, Any]] = Shelf(self._subject.device)
            state: Mapping[str, Any] = call.state_after
            for name in state:
                raw = state.raw(name) if isinstance(state, Shelf) else state[name]
                own.put(name, map_tensors(raw, snapshot_of))
            call.state_after = own
        self._states = [] if phase is None else [entry for entry in self._states if entry[0].phase.name != phase]
