"""Faults of the step function: gradients, accumulation, clipping, scaling, schedules, modes, buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.wrong_on_purpose.updates import models
from tests.wrong_on_purpose.updates.catalogue import fault

Built = tuple[Any, ...]
#: ``(wrong) -> step``
Make = Callable[[bool], Callable[[Any, Any, Any], None]]

_HOMES: dict[str, tuple[Any, Any]] = {
    "mlp": (models.mlp, models.classify),
    "convnet": (models.conv, models.classify),
    "gpt": (models.gpt, models.next_token),
    "vae": (models.vae, models.evidence_bound),
}


def step_fault(
    name: str, home: str, check: str, parameter: str | None = None, *, optimizer: Any = None, kind: str = "step",
    trained: bool = False, **arguments: Any,
) -> Callable[[Make], Make]:  # fmt: skip
    """Register a step function's fault; ``arguments`` go to Recipe.capture."""

    def register(make: Make) -> Make:
        def build(wrong: bool) -> Built:
            model, batch = _HOMES[home][0]()
            loss = _HOMES[home][1]
            live = (optimizer or (lambda p: torch.optim.SGD(p, lr=0.05)))(list(model.parameters()))
            if trained:
                models.train(model, batch, loss, live)
            more = {k: v(live) if k == "scheduler" else v for k, v in arguments.items()}
            return model, {"batch": batch, "loss": loss, "optimizer": live, "step": make(wrong), **more}

        fault(name, kind, home, check, parameter)(build)
        return make

    return register


def _parts(batch: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    size = next(iter(batch.values())).shape[0] // count
    return [{k: v[i * size : (i + 1) * size] for k, v in batch.items()} for i in range(count)]


@step_fault("zero_grad missing", "mlp", "step.gradient", "second.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        if not wrong:
            context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()

    return step


@step_fault("zero_grad between backward and step", "gpt", "step.gradient-present", "block.up.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.next_token(model, batch).backward()
        if wrong:
            context.optimizer.zero_grad(set_to_none=False)
        context.optimizer.step()

    return step


@step_fault("step before backward", "mlp", "step.gradient-present", "head.bias")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        loss = models.classify(model, batch)
        if wrong:
            context.optimizer.step()
            loss.backward()
        else:
            loss.backward()
            context.optimizer.step()

    return step


@step_fault("another loss than declared", "vae", "step.gradient", "encoder.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        again, mean, log_variance = model(batch["x"])
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()
        weight = 1.0 if wrong else 0.1
        (nn.functional.mse_loss(again, batch["x"]) + weight * divergence).backward()
        context.optimizer.step()

    return step


@step_fault("reparametrised sample detached", "vae", "step.gradient", "encoder.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        mean, log_variance = model.encoder(batch["x"]).chunk(2, dim=-1)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        again = model.decoder(z.detach() if wrong else z)
        divergence = -0.5 * (1 + log_variance - mean.square() - log_variance.exp()).sum(-1).mean()
        (nn.functional.mse_loss(again, batch["x"]) + 0.1 * divergence).backward()
        context.optimizer.step()

    return step


@step_fault("half of the batch", "mlp", "step.gradient", "first.weight", trained=True)
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, _parts(batch, 2)[0] if wrong else batch).backward()
        context.optimizer.step()

    return step


@step_fault("penalty added twice", "mlp", "step.gradient", "first.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        loss = models.classify(model, batch)
        if wrong:
            loss = loss + 1e-2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        context.optimizer.step()

    return step


@step_fault("sign of one gradient flipped", "convnet", "step.gradient", "conv.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        if wrong:
            model.conv.weight.grad.neg_()
        context.optimizer.step()

    return step


def _accumulated(count: int, *, divide: bool = True, only_last: bool = False, each: bool = False) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        for part in _parts(batch, count):
            if only_last:
                context.optimizer.zero_grad()
            loss = models.classify(model, part)
            (loss / count if divide else loss).backward()
            if each:
                context.optimizer.step()
        if not each:
            context.optimizer.step()

    return step


@step_fault("accumulated sum for mean", "mlp", "step.gradient", "second.weight", accumulate=4)
def _(wrong: bool) -> Any:
    return _accumulated(4, divide=not wrong)


@step_fault("only the last micro-batch", "mlp", "step.gradient", "head.weight", accumulate=3)
def _(wrong: bool) -> Any:
    return _accumulated(3, only_last=wrong)


@step_fault("a step per micro-batch", "mlp", "step.count", accumulate=2)
def _(wrong: bool) -> Any:
    return _accumulated(2, each=wrong)


for _dtype in (torch.float32, torch.bfloat16):

    def _unequal(wrong: bool, dtype: torch.dtype = _dtype) -> Built:
        """Micro-batches of 3 and 30 targets: each target must count alike, not each micro-batch."""
        model, _ = models.gpt()
        model = model.to(dtype)
        torch.manual_seed(3)
        tokens = torch.randint(0, 19, (2, 4, 9))
        parts = [{"tokens": t[:, :-1], "targets": t[:, 1:].clone()} for t in tokens]
        parts[0]["targets"][:, 1:] = -100
        parts[0]["targets"][3:] = -100

        def step(m: Any, batches: Any, context: Any) -> None:
            context.optimizer.zero_grad()
            total = sum(int((b["targets"] != -100).sum()) for b in batches)
            for b in batches:
                share = 1 / len(batches) if wrong else int((b["targets"] != -100).sum()) / total
                (models.next_token(m, b) * share).backward()
            context.optimizer.step()

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, {"batch": parts, "loss": models.next_token, "optimizer": optimizer, "step": step}

    fault(f"mean of means over unequal micro-batches, {_dtype}", "step", "gpt", "step.gradient", "block.up.weight")(
        _unequal
    )


@step_fault("stepped twice", "gpt", "step.count")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.next_token(model, batch).backward()
        for _ in range(2 if wrong else 1):
            context.optimizer.step()

    return step


@step_fault("never stepped", "vae", "step.count")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.evidence_bound(model, batch).backward()
        if not wrong:
            context.optimizer.step()

    return step


#: what to do with the gradients in place of one correct clipping
_CLIPPINGS: dict[str, tuple[str, str | None, Any]] = {
    "clipping forgotten": ("step.clipping", None, lambda m: None),
    "clipped to another norm": ("step.clipping", None, lambda m: nn.utils.clip_grad_norm_(m.parameters(), 0.2)),
    "clipped twice": (
        "step.clipping", None, lambda m: [nn.utils.clip_grad_norm_(m.parameters(), 0.05) for _ in range(2)],
    ),
    "clipped layer by layer": (
        "step.clipping", None, lambda m: [nn.utils.clip_grad_norm_([p], 0.05) for p in m.parameters()],
    ),
    "only the head clipped": (
        "step.gradient", "first.weight", lambda m: nn.utils.clip_grad_norm_(m.head.parameters(), 0.05),
    ),
    "clipped by value in place of norm": (
        "step.gradient", "second.weight", lambda m: nn.utils.clip_grad_value_(m.parameters(), 0.05),
    ),
}  # fmt: skip

for _name, (_check, _parameter, _clip) in _CLIPPINGS.items():

    @step_fault(_name, "mlp", _check, _parameter, clip_grad_norm=0.05)
    def _(wrong: bool, clip: Any = _clip) -> Any:
        def step(model: Any, batch: Any, context: Any) -> None:
            context.optimizer.zero_grad()
            models.classify(model, batch).backward()
            if wrong:
                clip(model)
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            context.optimizer.step()

        return step


@step_fault("clipping over a used-up generator", "gpt", "step.clipping", clip_grad_norm=0.05)
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.next_token(model, batch).backward()
        parameters = (p for p in model.parameters())
        if wrong:
            sum(p.numel() for p in parameters)
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nn.utils.clip_grad_norm_(parameters, 0.05)
        context.optimizer.step()

    return step


@step_fault("clipped by hand at the wrong scale", "vae", "step.clipping", clip_grad_norm=0.05)
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.evidence_bound(model, batch).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad.mul_(0.05 / (norm.square() if wrong else norm + 1e-6))
        context.optimizer.step()

    return step


@step_fault("clip by value forgotten", "convnet", "step.gradient", "conv.weight", expect={"clip_grad_value": 1e-3})
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        if not wrong:
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        context.optimizer.step()

    return step


def _scaled(wrong: str, clip: float | None = None) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        with torch.autocast(batch["x"].device.type, dtype=torch.float16):
            loss = models.classify(model, batch)
        context.scaler.scale(loss).backward()
        if clip is not None:
            if wrong != "clip before unscale":
                context.scaler.unscale_(context.optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if wrong == "not unscaled":
            context.optimizer.step()
        else:
            context.scaler.step(context.optimizer)
        context.scaler.update()

    return step


@step_fault(
    "clip before unscale", "mlp", "step.clipping", kind="precision", precision="fp16-autocast", clip_grad_norm=0.5
)
def _(wrong: bool) -> Any:
    return _scaled("clip before unscale" if wrong else "", 0.5)


@step_fault("scaled gradients never unscaled", "mlp", "step.gradient", "head.weight", kind="precision",
            precision="fp16-autocast")  # fmt: skip
def _(wrong: bool) -> Any:
    return _scaled("not unscaled" if wrong else "")


@step_fault("scaled gradients never unscaled, fused Adam", "mlp", "step.gradient", "head.weight", kind="precision",
            precision="fp16-autocast", optimizer=lambda p: torch.optim.Adam(p, fused=True))  # fmt: skip
def _(wrong: bool) -> Any:
    return _scaled("not unscaled" if wrong else "")


@step_fault("autocast left out", "mlp", "step.gradient", "first.weight", kind="precision", precision="bf16-autocast")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        with torch.autocast(batch["x"].device.type, dtype=torch.bfloat16, enabled=not wrong):
            loss = models.classify(model, batch)
        loss.backward()
        context.optimizer.step()

    return step


def _schedule(wrong: str) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.next_token(model, batch).backward()
        if wrong == "before":
            context.scheduler.step()
        context.optimizer.step()
        if wrong != "before":
            context.scheduler.step()
        if wrong == "twice":
            context.scheduler.step()
        if wrong == "overwritten":
            context.optimizer.param_groups[0]["lr"] = 0.01

    return step


for _how, _text in {"before": "scheduler before optimizer", "twice": "scheduler stepped twice",
                    "overwritten": "scheduled rate overwritten"}.items():  # fmt: skip

    @step_fault(_text, "gpt", "step.learning-rate",
                scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda k: 1 / (k + 1)))  # fmt: skip
    def _(wrong: bool, how: str = _how) -> Any:
        return _schedule(how if wrong else "")


@step_fault("left in eval mode", "convnet", "step.mode")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        model.train(not wrong)
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()

    return step


@step_fault("dropout switched off", "convnet", "step.mode")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        model.drop.train(not wrong)
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()

    return step


@step_fault("accuracy measured in train mode", "convnet", "buffers.batch-norm", kind="buffers")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()
        model.train(wrong)
        with torch.no_grad():
            (model(batch["x"]).argmax(-1) == batch["y"]).float().mean()
        model.train()

    # The twin measures in eval mode, which the declaration of modes does not know.
    if wrong:
        return step

    def plain(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()

    return plain


@step_fault("weights clipped by hand, undeclared", "mlp", "update.outside-step", "first.weight")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()
        if wrong:
            for parameter in model.parameters():
                parameter.data.clamp_(-0.01, 0.01)

    return step


@step_fault("frozen layer written by the step", "mlp", "update.frozen", "first.bias", expect={"frozen": ["first.bias"]},
            optimizer=lambda p: torch.optim.SGD([q.requires_grad_(i != 1) for i, q in enumerate(p)], 0.1))  # fmt: skip
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        context.optimizer.step()
        if wrong:
            model.first.bias.data.mul_(0.9)

    return step


@step_fault("tied head cut loose in the step", "gpt", "registration.tied", "embedding.weight", kind="persistence")
def _(wrong: bool) -> Any:
    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.next_token(model, batch).backward()
        context.optimizer.step()
        if wrong:
            model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())

    return step


class Student(nn.Module):
    """A student and the exponential moving average of it."""

    def __init__(self) -> None:
        super().__init__()
        self.student = models.Mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.student(x)


def _average(wrong: str) -> Any:
    def average(model: Any) -> None:
        decay = 0.9 if wrong == "decay" else 0.99
        with torch.no_grad():
            for shadow, weight in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
                shadow.mul_(decay).add_(weight, alpha=1 - decay)

    def step(model: Any, batch: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(model, batch).backward()
        if wrong == "before":
            average(model)
        context.optimizer.step()
        if wrong not in ("before", "never"):
            average(model)

    return step


for _how, _text in {
    "decay": "EMA with another decay",
    "before": "EMA before the step",
    "never": "EMA never updated",
}.items():

    def _ema(wrong: bool, how: str = _how) -> Built:
        _, batch = models.mlp()
        model = Student()
        with torch.no_grad():  # a teacher that has fallen behind
            for parameter in model.teacher.parameters():
                parameter.mul_(0.9)
        optimizer = torch.optim.Adam(model.student.parameters(), lr=1e-2)
        return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer,
                       "step": _average(how if wrong else ""),
                       "expect": {"ema": {"teacher": {"source": "student", "decay": 0.99}}}}  # fmt: skip

    fault(_text, "buffers", "mlp", "buffers.ema", "teacher.first.weight")(_ema)


class Averaged(nn.Module):
    """A model that carries torch's own average of a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = models.ConvNet()
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.95))
        self.average.requires_grad_(False)
        self.average.n_averaged.fill_(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


@fault("AveragedModel updated before the step", "buffers", "convnet", "buffers.ema", "average.module.conv.weight")
def _(wrong: bool) -> Built:
    _, batch = models.conv()
    model = Averaged()

    def step(m: Any, b: Any, context: Any) -> None:
        context.optimizer.zero_grad()
        models.classify(m, b).backward()
        if wrong:
            m.average.update_parameters(m.net)
        context.optimizer.step()
        if not wrong:
            m.average.update_parameters(m.net)

    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, "step": step,
                   "expect": {"ema": {"average": {"source": "net", "decay": 0.95}}}}  # fmt: skip
