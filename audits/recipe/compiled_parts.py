"""What of a training step is compiled by `torch.compile`: wrappers, modules, losses, and the functions they call.

An audit runs eager code: its instruments see operators, and compiled code shows none. So what is compiled has to be
known, and the report has to say that only the eager code behind it was run.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from audits.wording import listed

#: The whole model, in `Recipe.compiled`.
MODEL = "model"


def is_compiled(value: Any) -> bool:
    """Whether a callable is what `torch.compile` returns (and not what `torch.compiler.disable` does)."""
    marked = hasattr(value, "_torchdynamo_orig_callable") and not getattr(value, "_torchdynamo_disable", False)
    return bool(marked) and not isinstance(value, type)


def without_wrappers(model: nn.Module) -> tuple[nn.Module, Any]:
    """Return the module inside `torch.compile` and data-parallel wrappers, and how it was compiled.

    Returns:
        The module, and the outermost compiled wrapper's dynamo context (its backend, mode and options) or None.
    """
    context = None
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            context = context if context is not None else getattr(model, "dynamo_ctx", None)
            model = cast("nn.Module", model._orig_mod)
        else:
            return model, context


def compiled_parts(model: nn.Module, functions: Sequence[tuple[str, Any]]) -> tuple[str, ...]:
    """Return what is compiled.

    Args:
        model: the model as the training holds it, wrappers and all.
        functions: role -> loss or step function, as live objects.

    Returns:
        ``model``, ``module PATH``, ``method PATH.NAME``, ``loss PHASE``, ``step``, ``function NAME``.
    """
    inner, context = without_wrappers(model)
    found = [MODEL] if context is not None or getattr(inner, "_compiled_call_impl", None) is not None else []
    called: list[Any] = []
    for path, module in inner.named_modules():
        if path and (hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None):
            found.append(f"module {path}")
            continue
        if hasattr(module, "_orig_mod"):
            continue
        members = dict(vars(module))
        for kind in type(module).__mro__:
            if not kind.__module__.startswith("torch."):
                members = {**vars(kind), **members}
        for name, member in members.items():
            own = getattr(member, "__func__", member)
            if name != "_compiled_call_impl" and is_compiled(own) and not isinstance(own, nn.Module):
                found.append(f"method {path}.{name}" if path else f"method {name}")
            elif isinstance(own, types.FunctionType):
                called.append(own)
    for role, function in functions:
        if function is None:
            continue
        own = getattr(function, "__func__", function)
        if is_compiled(own) or getattr(own, "_compiled_call_impl", None) is not None:
            found.append(role)
        called.append(own if isinstance(own, types.FunctionType) else vars(type(own)).get("__call__"))
    for function in called:
        found += [f"function {name}" for name, value in _names_in(function) if is_compiled(value)]
    return tuple(dict.fromkeys(found))


def _names_in(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield the globals and closed-over values that a plain function's code names."""
    code = getattr(function, "__code__", None)
    if code is None:
        return
    known = getattr(function, "__globals__", {})
    codes = [code, *(constant for constant in code.co_consts if isinstance(constant, types.CodeType))]
    for name in dict.fromkeys(name for each in codes for name in each.co_names):
        if name in known:
            yield name, known[name]
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=False):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not filled yet
            continue


def describe_parts(parts: Sequence[str]) -> str:
    """Return the parts for a sentence: ``the model, module block.0 and 2 more``."""
    texts = ["the model" if part == MODEL else f"the {part}" if part.startswith("loss ") else part for part in parts]
    return listed(texts)


def eager() -> contextlib.AbstractContextManager[Any]:
    """Run compiled parts eagerly; where dynamo was never imported there are none, and importing it takes seconds."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


@contextlib.contextmanager
def compiled_code(model: nn.Module, parts: Sequence[str], context: Any) -> Iterator[None]:
    """Run what is compiled as compiled code; modules that lost their compilation on the way here are compiled anew.

    Past the recompile limit dynamo goes on eagerly without a word: here it raises.

    Args:
        model: the unwrapped model.
        parts: what `compiled_parts` found where the recipe was made, and here.
        context: how the model itself was compiled, where that is known.
    """
    import torch._dynamo

    modules = dict(model.named_modules())
    wanted = {"" if part == MODEL else part.removeprefix("module ") for part in parts if part.startswith("mod")}
    made: list[nn.Module] = []
    try:
        for path in sorted(wanted & modules.keys()):
            module = modules[path]
            if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
                continue
            compile_ = torch.compile if context is None or path else context
            module._compiled_call_impl = compile_(_in_a_frame(module._call_impl))
            made.append(module)
        with torch.compiler.set_stance("default"), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            yield
    finally:
        for module in made:
            module._compiled_call_impl = None


def compiled_anything() -> bool:
    """Whether dynamo compiled any frame in this process."""
    from torch._dynamo.utils import counters

    return counters["frames"]["ok"] > 0


def _in_a_frame(call: Any) -> Any:
    """Return the call in a function of its own: dynamo skips frames of `torch.nn` unless others call them.

    Its code object is new each time: what dynamo compiled, and its limit, belong to the code object.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return types.FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
