"""Devices as torch knows them: which one to audit on, its name, its random generators, its deterministic algorithms."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from audits.errors import RecipeError

#: What torch's notes on reproducibility ask ``CUBLAS_WORKSPACE_CONFIG`` to be.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")

#: Per device type, the states of the generators of all its devices.
GeneratorStates = tuple[tuple[str, tuple[torch.Tensor, ...]], ...]


def choose_device(device: str) -> torch.device:
    """Return the device of ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or any other type that torch finds here.

    ``"auto"`` is CUDA where there is a GPU, and the CPU elsewhere: another accelerator may lack float64 (as Apple's
    does), so whoever wants the audit there names it.

    Raises:
        RecipeError: torch knows no such device, or finds none here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        hint = "; did you mean 'cuda'?" if device.partition(":")[0].lower() == "gpu" else "; use 'cpu' or 'auto'"
        raise RecipeError(f"device {device!r} is unknown to torch {torch.__version__}{hint}") from error
    if chosen.type == "cpu":
        return chosen
    module = _module(chosen.type)
    if module is None or not module.is_available():
        named = "CUDA" if chosen.type == "cuda" else chosen.type
        raise RecipeError(f"device {device!r} was asked for and torch finds no {named} device; use 'cpu' or 'auto'")
    there = module.device_count() if hasattr(module, "device_count") else None
    if chosen.index is not None and there is not None and chosen.index >= there:
        raise RecipeError(f"device {device!r} was asked for and torch finds {there}, from {chosen.type}:0 on")
    return chosen


def mixes_devices(error: Exception) -> bool:
    """Whether torch refused to mix tensors of two devices, a generator with a tensor, or one that is not on the CPU."""
    text = str(error)
    wants_cpu = "CPU int64 tensor" in text  # lengths of packed sequences
    mixed = "same device" in text or "device type for generator" in text
    return isinstance(error, RuntimeError) and (mixed or wants_cpu)


@contextlib.contextmanager
def lengths_on_device() -> Iterator[None]:
    """Let `torch.ctc_loss` take lengths on the CPU under a dispatch mode too.

    Without a mode torch reads them there; under one it hands them to the device's kernel, which refuses them.
    """
    plain = torch.ctc_loss
    if not torch.accelerator.is_available():
        yield
        return

    def moved(log_probs: torch.Tensor, targets: torch.Tensor, *lengths: Any, **others: Any) -> torch.Tensor:
        def there(value: Any) -> Any:
            return value.to(log_probs.device) if isinstance(value, torch.Tensor) else value

        others = {name: there(value) for name, value in others.items()}
        return plain(log_probs, targets, *(there(value) for value in lengths), **others)

    torch.ctc_loss = moved
    try:
        yield
    finally:
        torch.ctc_loss = plain


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the device's type where it has none."""
    name = getattr(_module(device.type), "get_device_name", None)
    return device.type if device.type == "cpu" or name is None else str(name(device))


def _module(kind: str) -> Any:
    """Return ``torch.<kind>``, as torch's own `torch.get_device_module` does, or None."""
    module = getattr(torch, kind, None)
    return module if isinstance(module, ModuleType) and hasattr(module, "is_available") else None


def _in_use() -> list[tuple[str, Any]]:
    """Return the types of device, but for the CPU, whose generators something may have drawn from."""
    kinds = ["cuda"] if torch.cuda.is_initialized() else []
    other = torch.accelerator.current_accelerator()
    if other is not None and other.type != "cuda":
        kinds.append(other.type)
    found = ((kind, _module(kind)) for kind in kinds)
    return [(kind, module) for kind, module in found if module is not None and _ready(module)]


def _ready(module: Any) -> bool:
    asked = getattr(module, "is_initialized", module.is_available)
    return bool(asked())


def generator_states() -> GeneratorStates:
    """Return the states of the default generators of every device in use but the CPU."""
    return tuple((kind, _states(module)) for kind, module in _in_use())


def _states(module: Any) -> tuple[torch.Tensor, ...]:
    if hasattr(module, "get_rng_state_all"):
        return tuple(module.get_rng_state_all())
    return (module.get_rng_state(),)  # Apple's: one device


def set_generator_states(states: GeneratorStates) -> None:
    """Put the generators back to states that `generator_states` returned."""
    for kind, kept in states:
        module = _module(kind)
        if hasattr(module, "set_rng_state_all"):
            module.set_rng_state_all(list(kept))
        else:
            module.set_rng_state(kept[0])


def same_states(one: GeneratorStates, other: GeneratorStates) -> bool:
    """Whether the generators of every device stand at the same place."""
    return [(kind, len(kept)) for kind, kept in one] == [(kind, len(kept)) for kind, kept in other] and all(
        torch.equal(a, b) for (_, first), (_, second) in zip(one, other, strict=True)
        for a, b in zip(first, second, strict=True)
    )  # fmt: skip


def seed_generators(seed: int) -> None:
    """Seed the default generators of every device in use but the CPU."""
    for _, module in _in_use():
        seed_all = getattr(module, "manual_seed_all", None) or module.manual_seed
        seed_all(seed)


class Draws:
    """Random numbers made where they are used, from one seed: on a CPU the same as ``Generator().manual_seed(seed)``.

    Args:
        seed: of the generator on every device.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments ``generator`` and ``device`` of torch's random functions."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device=device).manual_seed(self._seed)
        return {"generator": self._generators[device], "device": device}


def default_generator_state(device: torch.device) -> torch.Tensor:
    """Return the state of the device's default generator."""
    if device.type == "cpu":
        return torch.get_rng_state()
    module = _module(device.type)
    assert module is not None
    state: torch.Tensor = module.get_rng_state() if device.type == "mps" else module.get_rng_state(device)
    return state


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Choose deterministic algorithms where there are any; what is left is measured as noise."""
    known = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        _set_cudnn_benchmark(False)
        yield
    finally:
        torch.use_deterministic_algorithms(known[0], warn_only=known[1])
        _set_cudnn_benchmark(benchmark)


def missing_determinism(device: torch.device) -> str:
    """Return half a sentence on what is missing for deterministic products on a device; empty where nothing is.

    cuBLAS reads the variable when it makes its workspace: it must be there before the process uses CUDA.
    """
    if device.type != "cuda" or os.environ.get("CUBLAS_WORKSPACE_CONFIG") in CUBLAS_WORKSPACES:
        return ""
    return "; cuBLAS is deterministic only with CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment from the start"


def _set_cudnn_benchmark(wanted: bool) -> None:
    """Set the flag, and no other, in a process that called `torch.backends.disable_global_flags` too.

    The bracket is the one that torch's own context managers for flags use. `torch.backends.cudnn.flags` itself would
    also set TF32 anew, and cannot put back a precision that was chosen for convolutions or recurrent layers alone.
    """
    with torch.backends.__allow_nonbracketed_mutation():  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = wanted
