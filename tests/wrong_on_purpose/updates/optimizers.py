"""Optimizers of our own with a mistake to switch on: each is correct with ``mistake=""``."""

from __future__ import annotations

import os
from typing import Any

import torch


class Own(torch.optim.Optimizer):
    """Base: one parameter after the other, as a user would write it.

    State is kept under the names of this class's own choosing, as in most code that is not torch's.
    """

    defaults_of: dict[str, Any] = {}

    def __init__(self, params: Any, mistake: str = "", **options: Any) -> None:
        self.mistake = mistake
        super().__init__(params, {"mistake": mistake, **self.defaults_of, **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    state = self.state[parameter]
                    if group["mistake"] == "state reset":
                        state.clear()
                    state["t"] = state.get("t", 0) + 1
                    self.move(parameter, parameter.grad, state, group, index)

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        raise NotImplementedError


class OwnAdam(Own):
    """Adam, or AdamW with ``decoupled``."""

    decoupled = False
    defaults_of = {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
    }

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, t = group["mistake"], state["t"]
        lr, eps, decay = group["lr"], group["eps"], group["weight_decay"]
        b1, b2 = group["betas"]
        if wrong == "betas swapped":
            b1, b2 = b2, b1
        if group["maximize"] and wrong != "maximize ignored":
            g = -g
        if wrong == "ascent":
            g = -g
        if wrong == "default lr":
            lr = self.defaults["lr"]
        if wrong == "default decay":
            decay = self.defaults["weight_decay"]
        if wrong == "lr twice":
            lr = 2 * lr
        if wrong == "decay twice":
            decay = 2 * decay
        if wrong == "decay missing" or (wrong == "decay on the first tensor only" and index):
            decay = 0.0
        coupled = self.decoupled == (wrong == "other decay")
        if decay and coupled:
            g = g + decay * p
        elif decay and wrong == "decay without lr":
            p.mul_(1 - decay)
        elif decay and wrong != "decay after the step":
            p.mul_(1 - lr * decay)
        start = torch.ones_like(p) if wrong == "second moment starts at one" else torch.zeros_like(p)
        m = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
        v = b2 * state.get("v", start) + (1 - b2) * (g.abs() if wrong == "absolute for square" else g * g)
        state["m"], state["v"] = m, v
        if wrong == "bfloat16 moments":
            state["m"], state["v"] = m.bfloat16().to(m.dtype), v.bfloat16().to(v.dtype)
            m, v = state["m"], state["v"]
        if group["amsgrad"] and wrong != "amsgrad ignored":
            v = state["largest"] = torch.maximum(state.get("largest", torch.zeros_like(v)), v)
        if wrong == "first moment unused":
            m = g * (1 - b1**t)
        if wrong == "one step too many":
            t = t + 1
        if wrong == "step counted per tensor":
            t = t + index
        first, second = 1 - b1**t, 1 - b2**t
        if wrong == "no bias correction":
            first = second = 1.0
        if wrong == "no second correction":
            second = 1.0
        root = (v / second + eps).sqrt() if wrong == "eps inside the root" else (v / second).sqrt() + eps
        if wrong == "eps omitted":
            root = (v / second).sqrt().clamp(min=1e-30)
        update = lr * (m / first) / root
        if wrong == "update clamped":
            update = update.clamp(-0.5 * lr, 0.5 * lr)
        if wrong == "last element skipped":
            update.view(-1)[-1] = 0.0
        p.sub_(update)
        if decay and not coupled and wrong == "decay after the step":
            p.mul_(1 - lr * decay)


class OwnAdamW(OwnAdam):
    decoupled = True
    defaults_of = {**OwnAdam.defaults_of, "weight_decay": 0.01}


class OwnSgd(Own):
    defaults_of = {
        "lr": 0.1,
        "momentum": 0.0,
        "dampening": 0.0,
        "nesterov": False,
        "weight_decay": 0.0,
        "maximize": False,
    }

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, momentum = group["mistake"], group["momentum"]
        g = -g if group["maximize"] else g
        decay = group["weight_decay"]
        g = g + (-decay if wrong == "decay sign" else decay) * p
        if momentum and wrong != "momentum missing":
            dampening = 0.0 if wrong == "dampening ignored" else group["dampening"]
            buffer = state.get("buffer")
            if buffer is None:
                buffer = (1 - dampening) * g if wrong == "first step dampened" else g.clone()
            else:
                buffer = momentum * buffer + (1 - dampening) * g
            if wrong == "buffer overwritten":
                buffer = g.clone() if state["t"] > 1 else buffer
            state["buffer"] = buffer
            nesterov = group["nesterov"] and wrong != "nesterov ignored"
            if wrong == "nesterov from the old buffer":
                nesterov, g = True, g + 1e-2 * buffer
            g = g + momentum * buffer if nesterov else buffer
        p.sub_(group["lr"] * g)


class OwnRmsprop(Own):
    defaults_of = {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "weight_decay": 0.0, "momentum": 0.0, "centered": False}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, alpha, eps = group["mistake"], group["alpha"], group["eps"]
        if wrong == "alpha for one minus alpha":
            alpha = 1 - alpha
        v = state["v"] = alpha * state.get("v", torch.zeros_like(p)) + (1 - alpha) * g * g
        if group["centered"]:
            mean = state["mean"] = alpha * state.get("mean", torch.zeros_like(p)) + (1 - alpha) * g
            v = v if wrong == "centering ignored" else v - mean * mean
        step = g / ((v + eps).sqrt() if wrong == "eps inside the root" else v.sqrt() + eps)
        if group["momentum"]:
            old = state.get("buffer", torch.zeros_like(p))
            step = state["buffer"] = (
                group["momentum"] * old + (1 - group["momentum"] if wrong == "mean momentum" else 1) * step
            )
        p.sub_(group["lr"] * step)


class OwnAdagrad(Own):
    defaults_of = {"lr": 1e-2, "lr_decay": 0.0, "weight_decay": 0.0, "initial_accumulator_value": 0.0, "eps": 1e-10}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong = group["mistake"]
        old = state.get("total", torch.full_like(p, group["initial_accumulator_value"]))
        total = state["total"] = g * g if wrong == "sum not kept" else old + g * g
        rate = group["lr"] / (1 + (state["t"] - 1) * (0.0 if wrong == "lr_decay ignored" else group["lr_decay"]))
        p.sub_(rate * g / (total.sqrt() + group["eps"]))


class OwnAdadelta(Own):
    defaults_of = {"lr": 1.0, "rho": 0.9, "eps": 1e-6, "weight_decay": 0.0}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, rho, eps = group["mistake"], group["rho"], group["eps"]
        v = state["v"] = rho * state.get("v", torch.zeros_like(p)) + (1 - rho) * g * g
        old = state.get("x", torch.zeros_like(p))
        step = (old + eps).sqrt() / (v + eps).sqrt() * g
        state["x"] = rho * old + (1 - rho) * (g if wrong == "gradient for update" else step).square()
        p.sub_(group["lr"] * step)


class OwnAdamax(Own):
    defaults_of = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        b1, b2 = group["betas"]
        m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
        decayed = b2 * state.get("u", torch.zeros_like(p))
        size = g.abs() + group["eps"]
        u = state["u"] = decayed + size if group["mistake"] == "sum for maximum" else torch.maximum(decayed, size)
        p.sub_(group["lr"] / (1 - b1 ** state["t"]) * m / u)


class OwnNadam(Own):
    defaults_of = {"lr": 2e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "momentum_decay": 4e-3}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, t, (b1, b2) = group["mistake"], state["t"], group["betas"]
        psi = 0.0 if wrong == "momentum not scheduled" else group["momentum_decay"]
        mu, after = b1 * (1 - 0.5 * 0.96 ** (t * psi)), b1 * (1 - 0.5 * 0.96 ** ((t + 1) * psi))
        product = state["product"] = state.get("product", 1.0) * mu
        m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        ahead = (1 - mu) / (1 - product) * g + after / (1 - product * after) * m
        p.sub_(group["lr"] * ahead / ((v / (1 - b2**t)).sqrt() + group["eps"]))


class OwnRadam(Own):
    defaults_of = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, t, (b1, b2) = group["mistake"], state["t"], group["betas"]
        m = state["m"] = b1 * state.get("m", torch.zeros_like(p)) + (1 - b1) * g
        v = state["v"] = b2 * state.get("v", torch.zeros_like(p)) + (1 - b2) * g * g
        limit = 2 / (1 - b2) - 1
        rho = limit - 2 * t * b2**t / (1 - b2**t)
        step = m / (1 - b1**t)
        if rho > 5 and wrong != "never rectified":
            r = ((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)) ** 0.5
            step = step * r * (1 - b2**t) ** 0.5 / (v.sqrt() + group["eps"])
        p.sub_(group["lr"] * step)


class OwnRprop(Own):
    defaults_of = {"lr": 1e-2, "etas": (0.5, 1.2), "step_sizes": (1e-6, 50.0)}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
        agree = g.sign() * state.get("old", torch.zeros_like(g)).sign()
        factor = torch.where(agree > 0, grow, torch.where(agree < 0, shrink, 1.0))
        size = state["size"] = (state.get("size", torch.full_like(p, group["lr"])) * factor).clamp(least, most)
        if group["mistake"] != "steps on a flipped sign":
            g = torch.where(agree < 0, torch.zeros_like(g), g)
        state["old"] = g.clone()
        p.sub_(g.sign() * size)


class OwnMuon(Own):
    defaults_of = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True,
                   "ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7, "ns_steps": 5,
                   "adjust_lr_fn": None}  # fmt: skip

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        wrong, momentum = group["mistake"], group["momentum"]
        b = state["b"] = momentum * state.get("b", torch.zeros_like(p)) + (1 - momentum) * g
        x = ((1 - momentum) * g + momentum * b).float()
        tall = x.shape[0] > x.shape[1]
        x = x.T if tall else x
        x = x / x.norm().clamp(min=1e-7)
        c1, c2, c3 = group["ns_coefficients"]
        for _ in range(0 if wrong == "not orthogonalised" else 5):
            a = x @ x.T
            x = c1 * x + (c2 * a + c3 * a @ a) @ x
        x = x.T if tall else x
        if wrong != "decay missing":
            p.mul_(1 - group["lr"] * group["weight_decay"])
        scale = 1.0 if wrong == "shape not scaled" else max(1.0, p.shape[0] / p.shape[1]) ** 0.5
        p.sub_(group["lr"] * scale * x)


class ForgetfulAdam(OwnAdam):
    """Counts its steps outside of ``state``: loading starts the count again."""

    def __init__(self, params: Any, mistake: str = "", **options: Any) -> None:
        super().__init__(params, mistake, **options)
        self.count = 0

    def step(self, closure: Any = None) -> None:
        self.count += 1
        super().step(closure)

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        if group["mistake"] == "count outside the state":
            state["t"] = self.count
        super().move(p, g, state, group, index)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if self.mistake == "moments dropped on loading":
                state.pop("m", None)
            if self.mistake == "count reset on loading":
                state["t"] = 0


class Lion(Own):
    """A rule the audit does not know: sign of an interpolated momentum, decoupled decay."""

    defaults_of = {"lr": 1e-3, "betas": (0.9, 0.99), "weight_decay": 0.0}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        if self.mistake == "moves without a gradient":
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is None:
                        parameter.mul_(0.99)
        super().step(closure)

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        b1, b2 = group["betas"]
        m = state.get("m", torch.zeros_like(p))
        direction = (b1 * m + (1 - b1) * g).sign()
        state["m"] = b2 * m + (1 - b2) * g
        if group["mistake"] == "ascends":
            direction = -direction
        if group["mistake"] == "random":
            unseeded = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
            direction = direction * torch.rand(direction.shape, generator=unseeded).to(direction)
        p.sub_(group["lr"] * direction)


class Unheard(Lion):
    """Lion under a name that no rule is found by."""


class ForeachSgd(OwnSgd):
    """Offers a foreach path of its own, in which decay may reach the group's first tensor only."""

    defaults_of = {**OwnSgd.defaults_of, "foreach": None}

    def move(self, p: torch.Tensor, g: torch.Tensor, state: dict[str, Any], group: dict[str, Any], index: int) -> None:
        if group["foreach"] and group["mistake"] == "decay once per foreach group" and index:
            group = {**group, "weight_decay": 0.0}
        super().move(p, g, state, group, index)


class TouchedAdam(torch.optim.Adam):
    """torch's Adam, whose state is tampered with after each step; a subclass says how."""

    mistake = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for state in self.state.values():
            if self.mistake == "moments halved after the step":
                state["exp_avg"].mul_(0.5)
            if self.mistake == "step counted twice":
                state["step"] += 1
        return loss
