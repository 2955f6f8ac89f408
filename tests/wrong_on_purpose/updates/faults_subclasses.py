"""Subclasses of torch's optimizers that write ``step`` anew; correct twins move as their ancestor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.wrong_on_purpose.updates import models
from tests.wrong_on_purpose.updates.catalogue import CATALOGUE, Fault

_HOMES: dict[str, tuple[Any, Any, str]] = {
    "mlp": (models.mlp, models.classify, "second.weight"),
    "convnet": (models.conv, models.classify, "conv.weight"),
    "gpt": (models.gpt, models.next_token, "block.up.weight"),
    "vae": (models.vae, models.evidence_bound, "decoder.weight"),
}


class MyAdamW(torch.optim.AdamW):
    """AdamW as a loop of one's own, its state under names of one's own; a subclass sets ``mistake``."""

    mistake = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        wrong = self.mistake
        for group in self.param_groups:
            if wrong == "first group's options":
                group = {**self.param_groups[0], "params": group["params"]}
            for p in group["params"]:
                if p.grad is None:
                    continue
                g, lr, decay, (b1, b2) = p.grad, group["lr"], group["weight_decay"], group["betas"]
                state = self.state[p]
                state["t"] = t = state.get("t", 0) + 1
                if wrong == "decay coupled":
                    g = g + decay * p
                elif wrong != "decay missing":
                    p.mul_(1 - lr * decay)
                m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
                v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
                first, second = (1.0, 1.0) if wrong == "bias not corrected" else (1 - b1**t, 1 - b2**t)
                root = (v / second + group["eps"]).sqrt() if wrong == "eps under the root" else (v / second).sqrt()
                update = (m / first) / (root if wrong == "eps under the root" else root + group["eps"])
                if wrong == "signs for large updates":
                    update = update.clamp(-0.5, 0.5)
                if wrong == "tail skipped":
                    update.view(-1)[update.numel() // 4 * 4 :] = 0.0
                p.sub_(lr * update)


class FlaggedAdamW(MyAdamW):
    """The same mistakes by an argument of the constructor, which is in no group."""

    def __init__(self, params: Any, lr: float = 1e-3, mistake: str = "", weight_decay: float = 0.1) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.mistake = mistake


class MySGD(torch.optim.SGD):
    """SGD with momentum as a loop of one's own."""

    mistake = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad + group["weight_decay"] * p
                old = self.state[p].get("velocity")
                new = g if old is None else group["momentum"] * old + (1 - group["dampening"]) * g
                self.state[p]["velocity"] = new if self.mistake != "momentum forgotten" else g
                g = g + group["momentum"] * new if group["nesterov"] and self.mistake != "nesterov ignored" else new
                p.sub_(group["lr"] * g * (0.5 if self.mistake == "half the rate" else 1.0))


class MyRMSprop(torch.optim.RMSprop):
    """RMSprop as a loop of one's own."""

    mistake = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                old = self.state[p].get("square", torch.zeros_like(p))
                v = self.state[p]["square"] = group["alpha"] * old + (1 - group["alpha"]) * p.grad * p.grad
                under = self.mistake == "eps under the root"
                p.sub_(group["lr"] * p.grad / ((v + group["eps"]).sqrt() if under else v.sqrt() + group["eps"]))


def _plant(
    mistake: str, own: type[Any], home: str, *, trained: bool = False, check: str = "update.rule", **options: Any
) -> None:  # fmt: skip
    make, loss, named = _HOMES[home]

    def build(wrong: bool) -> tuple[nn.Module, dict[str, Any]]:
        model, batch = make()
        params: Any = list(model.parameters())
        if mistake == "first group's options":
            params = [{"params": params[:1]}, {"params": params[1:], "lr": 7e-3}]
        chosen = type(own.__name__, (own,), {"mistake": mistake}) if wrong else own
        optimizer = chosen(params, **options)
        if wrong and own is FlaggedAdamW:
            optimizer = own(params, mistake=mistake, **options)
        if trained:
            models.train(model, batch, loss, optimizer)
        return model, {"batch": batch, "loss": loss, "optimizer": optimizer}

    CATALOGUE.append(Fault(f"{own.__name__}: {mistake}", "rule", home + (", trained" if trained else ""),
                           check, named if check == "update.rule" else None, build))  # fmt: skip


_plant("decay coupled", MyAdamW, "gpt", weight_decay=0.1)
_plant("decay coupled", MyAdamW, "mlp", weight_decay=0.1, trained=True)
_plant("decay missing", MyAdamW, "vae")
_plant("decay missing", MyAdamW, "mlp", weight_decay=1e-4)
_plant("bias not corrected", MyAdamW, "mlp")
_plant("bias not corrected", MyAdamW, "convnet", trained=True)
_plant("eps under the root", MyAdamW, "convnet", eps=1e-6)
_plant("first group's options", MyAdamW, "vae")
_plant("signs for large updates", MyAdamW, "gpt")
_plant("tail skipped", MyAdamW, "vae")
_plant("decay coupled", FlaggedAdamW, "gpt")
_plant("bias not corrected", FlaggedAdamW, "mlp", trained=True)
_plant("momentum forgotten", MySGD, "mlp", check="optimizer.probe", lr=0.1, momentum=0.9)
_plant("nesterov ignored", MySGD, "vae", lr=0.1, momentum=0.9, nesterov=True)
_plant("half the rate", MySGD, "convnet", lr=0.1)
_plant("eps under the root", MyRMSprop, "gpt", eps=1e-6)
