"""What an evaluation can change in a model and around it, remembered and put back."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from audits.live.lending import others_in_place, takes_storage_of
from audits.live.remembering import Memory
from audits.random_state import RandomState


class ModuleState:
    """Everything of a model that a forward in train mode may change by itself, but its parameters' values.

    Buffers, modes, attributes (tensors, containers, generators, objects), and which parameters, buffers and submodules
    are registered under which name.

    Args:
        model: the model.
        hooks: put back the modules' hooks too; for when nobody listens any more.
    """

    def __init__(self, model: nn.Module, *, hooks: bool = False) -> None:
        self._memory = Memory(model, hooks=hooks)

    def leaves(self) -> list[torch.Tensor]:
        """Return the remembered tensors, buffers among them, that are leaves with memory of their own."""
        return [
            tensor
            for tensor in self._memory.tensors
            if tensor.is_leaf and tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_inference()
        ]

    def restore(self) -> None:
        """Put everything back: the same objects, with the values they had; what is new goes."""
        self._memory.restore()


#: By a parameter's id, the storage that its values came from: nobody writes there while the model is lent.
Originals = Mapping[int, torch.Tensor]


class ParameterState:
    """Values, gradients and ``requires_grad`` of all parameters.

    Args:
        model: the model.
        originals: what `borrowed` lends beside the model; a parameter's values there are not copied once more.
    """

    def __init__(self, model: nn.Module, originals: Originals | None = None) -> None:
        lent = originals or {}
        self._saved = [(p, _untouched(p, lent.get(id(p))), p.device, p.requires_grad) for p in model.parameters()]
        self._values = {id(p): value for p, value, _, _ in self._saved}

    def value(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return a parameter's native values at the audit's start, on its device; not to be written."""
        return self._values[id(parameter)].to(parameter.device)

    def held(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return them where they wait: in host memory, or where they came from; not to be written."""
        return self._values[id(parameter)]

    def restore(self) -> None:
        """Put the values back and drop the gradients."""
        for parameter, value, device, requires_grad in self._saved:
            if parameter.data.dtype == value.dtype and parameter.data.device == device:
                parameter.data.copy_(value)
            else:
                parameter.data = value.to(device, copy=True)
            parameter.grad = None
            parameter.requires_grad_(requires_grad)


def _untouched(parameter: torch.Tensor, original: torch.Tensor | None) -> torch.Tensor:
    """Return values of the parameter that stay: where they came from, if they are laid out alike; else a copy."""
    data = parameter.data
    alike = original is not None and original.dtype == data.dtype and original.shape == data.shape
    if original is not None and alike and original.stride() == data.stride():
        return original
    return data.to("cpu", copy=True)  # wherever the model is: a device has no room for what only waits


class _TensorHooks:
    """The hooks on some tensors: a forward may add more each time it runs."""

    _KINDS = ("_backward_hooks", "_post_accumulate_grad_hooks")

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._saved = [(t, kind, hooks, dict(hooks or {})) for t in tensors for kind in self._KINDS
                       for hooks in [getattr(t, kind)]]  # fmt: skip

    def restore(self) -> None:
        """Put the hooks back."""
        for tensor, kind, hooks, saved in self._saved:
            if getattr(tensor, kind) is not hooks:
                setattr(tensor, kind, hooks)
            if hooks is not None and (len(hooks) != len(saved) or any(hooks.get(k) is not v for k, v in saved.items())):
                hooks.clear()
                hooks.update(saved)


@contextlib.contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[Originals]:
    """Lend the model out on ``device`` and give it back bit for bit as it was, whatever is raised meanwhile.

    The parameters and buffers keep their identity but get storage of their own (where a device's tensors are of another
    kind, others stand in their place), so whatever happens to the values meanwhile happens to a copy; gradients, modes,
    attributes, hooks, what is registered under which name, and random generators are put back as well. An interrupt
    waits until all of it is.

    Yields:
        The parameters' own values by the parameters' ids; empty where others stand in their place.
    """
    generators = RandomState.now()
    modules = ModuleState(model, hooks=True)
    parameters = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    hooks = _TensorHooks(p for p, _, _, _ in parameters)
    buffers = {id(b): (b, b.data) for b in model.buffers()}

    def parameters_back() -> None:
        for parameter, value, gradient, requires_grad in parameters:
            parameter.data = value
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient

    def buffers_back() -> None:
        for buffer, value in buffers.values():
            buffer.data = value

    try:
        if takes_storage_of(model, device):
            for parameter, value, _, _ in parameters:
                parameter.data = value.detach().clone().to(device)
                parameter.grad = None
            for buffer, value in buffers.values():
                buffer.data = value.detach().clone().to(device)
            yield {id(parameter): value.detach() for parameter, value, _, _ in parameters}
        else:
            with others_in_place(model, device):
                yield {}
    finally:
        with interrupts_held(), contextlib.ExitStack() as each_of_them:  # last in, first out
            each_of_them.callback(generators.restore)
            each_of_them.callback(hooks.restore)
            each_of_them.callback(modules.restore)
            each_of_them.callback(parameters_back)
            each_of_them.callback(buffers_back)


@contextlib.contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while the body runs; it is raised at its end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no interrupt is raised here
        return
    waiting: list[tuple[int, types.FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if waiting:
            before(*waiting[0])
