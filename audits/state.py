"""What an evaluation can change in a model and around it, remembered and put back."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from audits.devices import GeneratorStates, generator_states, set_generator_states
from audits.lending import others_in_place, takes_storage_of

#: Attribute types of a module that a forward may replace or change in place (step counters, caches).
_PLAIN = (bool, int, float, str, type(None))
_CONTAINERS = (list, dict, set)


@dataclass(frozen=True)
class RandomState:
    """The state of torch's (CPU and any device in use), NumPy's and Python's global generators."""

    cpu: torch.Tensor
    devices: GeneratorStates
    numpy: Any
    python: Any

    @classmethod
    def now(cls) -> RandomState:
        """Remember the generators as they are."""
        return cls(torch.get_rng_state(), generator_states(), np.random.get_state(), random.getstate())

    def restore(self) -> None:
        """Put the generators back."""
        torch.set_rng_state(self.cpu)
        set_generator_states(self.devices)
        np.random.set_state(self.numpy)
        random.setstate(self.python)


def seed_everything(seed: int) -> None:
    """Seed torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random generators as they were."""
    state = RandomState.now()
    try:
        yield
    finally:
        state.restore()


class ModuleState:
    """Buffers, modes and plain attributes of all modules: what a forward in train mode changes by itself."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = []
        for module in model.modules():
            buffers = {name: (b, None if b is None else b.detach().clone()) for name, b in module._buffers.items()}
            self._modules.append((module, module.training, buffers, _attributes(module)))

    def restore(self) -> None:
        """Put everything back: the same buffer objects, with the values they had."""
        for module, training, buffers, attributes in self._modules:
            if module.training is not training:
                module.training = training
            for name in [n for n in module._buffers.keys() if n not in buffers]:  # noqa: SIM118 - a ScriptModule's is no dict
                del module._buffers[name]
            for name, (buffer, saved) in buffers.items():
                if buffer is not None and saved is not None:
                    if buffer.dtype != saved.dtype or buffer.device != saved.device or buffer.shape != saved.shape:
                        buffer.data = saved.clone()
                    elif buffer.numel():
                        buffer.data.copy_(saved)
                module._buffers[name] = buffer
            _restore_attributes(module, attributes)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Name -> (object, copy of its value) of the module's own attributes that a forward may change."""
    kept: dict[str, tuple[Any, Any]] = {}
    for name, value in vars(module).items():
        if (name.startswith("_") and not isinstance(value, _PLAIN)) or name == "training":
            continue
        if isinstance(value, _PLAIN):
            kept[name] = (value, value)
        elif isinstance(value, torch.Tensor):
            kept[name] = (value, None if value.requires_grad else value.detach().clone())
        elif type(value) in _CONTAINERS:
            kept[name] = (value, value.copy())
    return kept


def _restore_attributes(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    own = vars(module)
    for name, value in list(own.items()):
        if name not in attributes and name != "training" and isinstance(value, (*_PLAIN, torch.Tensor)):
            del own[name]
    for name, (value, saved) in attributes.items():
        if isinstance(value, torch.Tensor):
            if saved is not None and value.shape == saved.shape and value.numel():
                value.data.copy_(saved)
        elif type(value) in _CONTAINERS and value != saved:
            value.clear()
            value.extend(saved) if isinstance(value, list) else value.update(saved)
        own[name] = value


class ParameterState:
    """Values, gradients and ``requires_grad`` of all parameters."""

    def __init__(self, model: nn.Module) -> None:
        self._saved = [(p, p.data.clone(), p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Put the values back and drop the gradients."""
        for parameter, value, requires_grad in self._saved:
            if parameter.data.dtype == value.dtype and parameter.data.device == value.device:
                parameter.data.copy_(value)
            else:
                parameter.data = value.clone()
            parameter.grad = None
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def borrowed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Lend the model out on ``device`` and give it back bit for bit as it was.

    The parameters and buffers keep their identity but get storage of their own (where a device's tensors are of another
    kind, others stand in their place), so whatever happens to the values meanwhile happens to a copy; gradients, modes, attributes and random generators are put back as well.
    """
    generators = RandomState.now()
    parameters = [(p, p.data, p.grad, p.requires_grad) for p in model.parameters()]
    modules = ModuleState(model)
    buffers = {id(b): (b, b.data) for b in model.buffers()}
    training = [(module, module.training) for module in model.modules()]
    try:
        if takes_storage_of(model, device):
            for parameter, value, _, _ in parameters:
                parameter.data = value.detach().clone().to(device)
                parameter.grad = None
            for buffer, value in buffers.values():
                buffer.data = value.detach().clone().to(device)
            yield
        else:
            with others_in_place(model, device):
                yield
    finally:
        for buffer, value in buffers.values():
            buffer.data = value
        modules.restore()
        for module, mode in training:
            module.training = mode
        for parameter, value, gradient, requires_grad in parameters:
            parameter.data = value
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        generators.restore()
