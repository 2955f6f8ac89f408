"""A step function for training loops written with accelerate: the audit's optimizer and schedule, prepared.

A loop is stored as its own function, and ``with accelerated(...)`` gives it what ``accelerator.prepare`` gave it in
training::

    def train_step(model, batches, context):
        with accelerated(model, context, gradient_accumulation_steps=4) as (accelerator, model, optimizer, scheduler):
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from registry_models.integrations.surroundings import nothing_left_behind, plain_step, prepared_for_a_while, scale_with


@contextlib.contextmanager
def accelerated(
    model: nn.Module, context: Any, *, phase: str | None = None, mixed_precision: str = "no", **options: Any
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Give an ``Accelerator`` with the model, the optimizer and the schedule prepared; put all back afterwards.

    Args:
        model: the model that the step function was given.
        context: the step function's context.
        phase: whose optimizer; the first by default.
        mixed_precision: as for ``Accelerator``; under ``"fp16"`` the loss is scaled by the audit's own scaler.
        options: passed on to ``Accelerator``, ``gradient_accumulation_steps`` say.

    Yields:
        ``(accelerator, model, optimizer, scheduler)``; the scheduler is None where the recipe declares none.
    """
    name = phase or next(iter(context.optimizers))
    optimizer, scheduler = context.optimizers[name], context.schedulers.get(name)
    half = mixed_precision == "fp16"
    with nothing_left_behind(), prepared_for_a_while(model), plain_step(optimizer):
        accelerator = importlib.import_module("accelerate").Accelerator(
            cpu=context.device.type == "cpu", mixed_precision="no" if half else mixed_precision, **options
        )
        if half:
            scale_with(accelerator, context.scaler)
        prepared = accelerator.prepare_model(model), accelerator.prepare_optimizer(optimizer)
        yield accelerator, *prepared, None if scheduler is None else accelerator.prepare_scheduler(scheduler)
