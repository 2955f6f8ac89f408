"""Faults of the rule: an optimizer of one's own, declared to follow a published rule, that does not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.wrong_on_purpose.updates import models, optimizers
from tests.wrong_on_purpose.updates.catalogue import CATALOGUE, Fault

#: architecture -> (model and batch, loss, the parameter whose row must fail)
_HOMES: dict[str, tuple[Any, Any, str]] = {
    "mlp": (models.mlp, models.classify, "second.weight"),
    "convnet": (models.conv, models.classify, "conv.weight"),
    "gpt": (models.gpt, models.next_token, "block.up.weight"),
    "vae": (models.vae, models.evidence_bound, "decoder.weight"),
}


def _plant(
    mistake: str, own: type[Any], rule: str, home: str, *, check: str = "update.rule", trained: bool = False,
    groups: bool = False, parameter: str | None = "", **options: Any,
) -> None:  # fmt: skip
    make, loss, default = _HOMES[home]

    def build(wrong: bool) -> tuple[nn.Module, dict[str, Any]]:
        model, batch = make()
        params: Any = list(model.parameters())
        if groups:  # options of the group differ from the constructor's
            params = [{"params": params, "lr": 5e-3, "weight_decay": 0.05}]
        optimizer = own(params, mistake if wrong else "", **options)
        if trained:
            models.train(model, batch, loss, own(params if not groups else model.parameters(), "", **options))
        return model, {"batch": batch, "loss": loss, "optimizer": optimizer, "expect": {"optimizer": rule}}

    named = default if parameter == "" else parameter
    CATALOGUE.append(Fault(f"{rule}: {mistake}", "rule", home + (", trained" if trained else ""), check, named, build))


A, W, S = optimizers.OwnAdam, optimizers.OwnAdamW, optimizers.OwnSgd

_plant("other decay", W, "AdamW", "gpt", weight_decay=0.1)
_plant("other decay", A, "Adam", "mlp", weight_decay=0.1)
_plant("decay missing", W, "AdamW", "vae")
_plant("decay missing", W, "AdamW", "mlp", lr=2e-5, trained=True)
_plant("decay twice", W, "AdamW", "convnet")
_plant("decay without lr", W, "AdamW", "mlp")
_plant("decay after the step", W, "AdamW", "gpt")
_plant("decay on the first tensor only", W, "AdamW", "gpt", weight_decay=0.1)
_plant("ascent", A, "Adam", "convnet")
_plant("no bias correction", A, "Adam", "vae")
_plant("no second correction", A, "Adam", "mlp", trained=True)
_plant("one step too many", A, "Adam", "mlp")
_plant("eps inside the root", A, "Adam", "convnet", eps=1e-6)
_plant("eps omitted", A, "Adam", "vae", eps=1e-5)
_plant("betas swapped", A, "Adam", "mlp", betas=(0.8, 0.95), trained=True)
_plant("absolute for square", A, "Adam", "gpt")
_plant("first moment unused", A, "Adam", "mlp", trained=True)
_plant("amsgrad ignored", A, "Adam", "mlp", amsgrad=True, check="optimizer.probe", parameter=None)
_plant("lr twice", A, "Adam", "gpt")
_plant("default lr", A, "Adam", "vae", groups=True)
_plant("default decay", W, "AdamW", "convnet", groups=True)
_plant("step counted per tensor", A, "Adam", "gpt")
_plant("maximize ignored", A, "Adam", "mlp", maximize=True)
_plant("second moment starts at one", A, "Adam", "convnet")
_plant("state reset", A, "Adam", "gpt")
_plant("update clamped", A, "Adam", "mlp", trained=True)
_plant("last element skipped", A, "Adam", "convnet")
_plant("bfloat16 moments", A, "Adam", "mlp", trained=True)
_plant("momentum missing", S, "SGD", "mlp", momentum=0.9, trained=True)
_plant("first step dampened", S, "SGD", "vae", momentum=0.9, dampening=0.5)
_plant("dampening ignored", S, "SGD", "convnet", momentum=0.9, dampening=0.5)
_plant("nesterov ignored", S, "SGD", "gpt", momentum=0.9, nesterov=True)
_plant("nesterov from the old buffer", S, "SGD", "mlp", momentum=0.9, nesterov=True)
_plant("buffer overwritten", S, "SGD", "convnet", momentum=0.9)
_plant("decay sign", S, "SGD", "vae", weight_decay=1e-2)
_plant("eps inside the root", optimizers.OwnRmsprop, "RMSprop", "mlp", eps=1e-6)
_plant("centering ignored", optimizers.OwnRmsprop, "RMSprop", "vae", centered=True)
_plant("alpha for one minus alpha", optimizers.OwnRmsprop, "RMSprop", "gpt")
_plant("mean momentum", optimizers.OwnRmsprop, "RMSprop", "convnet", momentum=0.5)
_plant("sum not kept", optimizers.OwnAdagrad, "Adagrad", "mlp")
_plant("lr_decay ignored", optimizers.OwnAdagrad, "Adagrad", "gpt", lr_decay=0.1)
_plant("gradient for update", optimizers.OwnAdadelta, "Adadelta", "vae")
_plant("sum for maximum", optimizers.OwnAdamax, "Adamax", "convnet")
_plant("momentum not scheduled", optimizers.OwnNadam, "NAdam", "gpt")
_plant("never rectified", optimizers.OwnRadam, "RAdam", "mlp", check="optimizer.probe", parameter=None)
_plant("steps on a flipped sign", optimizers.OwnRprop, "Rprop", "vae", check="optimizer.probe", parameter=None)
for _mistake in ("not orthogonalised", "decay missing", "shape not scaled"):

    def _muon(wrong: bool, mistake: str = _mistake) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 40, bias=False), nn.Tanh(), nn.Linear(40, 5, bias=False))
        batch = {"x": torch.randn(32, 12), "y": torch.randint(0, 5, (32,))}
        optimizer = optimizers.OwnMuon(model.parameters(), mistake if wrong else "", weight_decay=0.5)
        return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, "expect": {"optimizer": "Muon"}}

    CATALOGUE.append(Fault(f"Muon: {_mistake}", "rule", "mlp", "update.rule", "0.weight", _muon))

for _mistake in ("moves without a gradient", "ascends", "random"):

    def _lion(wrong: bool, mistake: str = _mistake) -> tuple[nn.Module, dict[str, Any]]:
        model, batch = models.gpt()
        optimizer = optimizers.Unheard(model.parameters(), mistake if wrong else "")
        return model, {"batch": batch, "loss": models.next_token, "optimizer": optimizer}

    CATALOGUE.append(Fault(f"unknown rule: {_mistake}", "rule", "gpt", "optimizer.invariants", None, _lion))

for _mistake in ("count outside the state", "moments dropped on loading", "count reset on loading"):

    def _forgetful(wrong: bool, mistake: str = _mistake) -> tuple[nn.Module, dict[str, Any]]:
        model, batch = models.vae()
        optimizer = optimizers.ForgetfulAdam(model.parameters(), mistake if wrong else "")
        return model, {"batch": batch, "loss": models.evidence_bound, "optimizer": optimizer,
                       "expect": {"optimizer": "Adam"}}  # fmt: skip

    CATALOGUE.append(
        Fault(f"state: {_mistake}", "persistence", "vae", "registration.state-round-trip", None, _forgetful)
    )


def _foreach(wrong: bool) -> tuple[nn.Module, dict[str, Any]]:
    model, batch = models.gpt()
    mistake = "decay once per foreach group" if wrong else ""
    optimizer = optimizers.ForeachSgd(model.parameters(), mistake, foreach=True, weight_decay=0.1)
    return model, {"batch": batch, "loss": models.next_token, "optimizer": optimizer, "expect": {"optimizer": "SGD"}}


CATALOGUE.append(Fault("SGD: decay once per foreach group", "rule", "gpt", "optimizer.parity", None, _foreach))

for _mistake in ("moments halved after the step", "step counted twice"):

    def _touched(wrong: bool, mistake: str = _mistake) -> tuple[nn.Module, dict[str, Any]]:
        model, batch = models.conv()
        own = type("Touched", (optimizers.TouchedAdam,), {"mistake": mistake}) if wrong else optimizers.TouchedAdam
        optimizer = own(model.parameters())
        return model, {"batch": batch, "loss": models.classify, "optimizer": optimizer, "expect": {"optimizer": "Adam"}}

    CATALOGUE.append(Fault(f"Adam: {_mistake}", "persistence", "convnet", "update.state", "conv.weight", _touched))
