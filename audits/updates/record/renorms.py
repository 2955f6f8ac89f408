"""Rows that a forward rescales in place to a largest norm: torch's own way, and no write behind the optimizer's back.

`torch.nn.Embedding(max_norm=)` and its functional forms call `torch.embedding_renorm_` on the rows they are about to
use; `Tensor.renorm_` in a module's forward does the same to all. What such a call changes is added to the recorder's
shadow of the weights, so that everything else that was written, to other rows or before it, still shows.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch

from audits.live.subject import Subject
from audits.updates.pausing import Pausable
from audits.updates.record.recorder import Recorder


class Renorms(Pausable):
    """Listens to torch's renormalisation of a parameter's rows during a training step.

    Attributes:
        found: names of the parameters that it changed so far.
    """

    def __init__(self, subject: Subject, recorder: Recorder) -> None:
        self._subject = subject
        self._recorder = recorder
        self.found: set[str] = set()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen during one training step."""
        module: Any = torch
        tensor: Any = torch.Tensor
        embedding, own = module.embedding_renorm_, "renorm_" in tensor.__dict__
        renorm = tensor.renorm_

        def in_forward(weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not _inside_forward(sys._getframe(1)):
                return renorm(weight, *args, **kwargs)
            return self._around(renorm, weight, *args, **kwargs)

        module.embedding_renorm_ = lambda weight, *args, **kwargs: self._around(embedding, weight, *args, **kwargs)
        tensor.renorm_ = in_forward
        try:
            yield
        finally:
            module.embedding_renorm_ = embedding
            if own:
                tensor.renorm_ = renorm
            else:
                del tensor.renorm_

    def _around(self, function: Callable[..., Any], weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = None if self.is_paused else self._name(weight)
        if name is None:
            return function(weight, *args, **kwargs)
        before = weight.detach().clone()
        result = function(weight, *args, **kwargs)
        shadow = self._recorder.shadow[name]
        # what was not as the shadow has it before the call was written by somebody else, and stays visible
        changed = (weight.detach() != before) & (before == shadow)
        if bool(changed.any()):
            self._recorder.shadow[name] = torch.where(changed, weight.detach(), shadow)
            self.found.add(name)
        return result

    def _name(self, weight: torch.Tensor) -> str | None:
        for name, parameter in self._subject.parameters.items():
            if parameter.data_ptr() == weight.data_ptr() and parameter.shape == weight.shape and parameter.numel():
                return name if name in self._recorder.shadow else None
        return None


def _inside_forward(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is torch.nn.Module._call_impl.__code__:
            return True
        frame = frame.f_back
    return False
