"""Optimizers that no rule is known for, each with mistakes to switch on; correct with ``mistake=""``."""

from __future__ import annotations

from typing import Any

import torch


class Foreign(torch.optim.Optimizer):
    """Momentum towards the gradient's cube root, with decoupled decay: nobody's published rule."""

    def __init__(
        self, params: Any, lr: float = 1e-3, beta: float = 0.9, weight_decay: float = 0.0, nesterov: bool = False,
        maximize: bool = False, mistake: str = "",
    ) -> None:  # fmt: skip
        defaults = {"lr": lr, "beta": beta, "weight_decay": weight_decay, "nesterov": nesterov, "maximize": maximize}
        super().__init__(params, {**defaults, "mistake": mistake})
        self.count = self.place = 0
        self.cache: dict[Any, torch.Tensor] = {}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else torch.enable_grad()(closure)()
        wrong = self.defaults["mistake"]
        self.count += 1
        self.place = 0
        for group in self.param_groups:
            options = self.options_of(group)
            for parameter in group["params"]:
                if parameter.grad is None:
                    if wrong == "decays what has no gradient":
                        parameter.mul_(1.0 - 0.01 * options["lr"])
                    if wrong == "decays what is frozen" and not parameter.requires_grad:
                        parameter.mul_(0.999)
                    if wrong == "goes on without gradient" and "m" in self.state[parameter]:
                        parameter.sub_(options["lr"] * self.state[parameter]["m"])
                    continue
                self.move(parameter, self.gradient_of(parameter, options), options)
        return loss

    def options_of(self, group: dict[str, Any]) -> dict[str, Any]:
        if self.defaults["mistake"] == "first group's options for all":
            return self.param_groups[0]
        if self.defaults["mistake"] == "default lr for all":
            return {**group, "lr": self.defaults["lr"]}
        if self.defaults["mistake"] == "default decay for all":
            return {**group, "weight_decay": self.defaults["weight_decay"]}
        return group

    def gradient_of(self, p: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        assert p.grad is not None
        g = p.grad
        if options["maximize"] and self.defaults["mistake"] != "maximize ignored":
            g = -g
        return -g if self.defaults["mistake"] == "ascends" else g

    def move(self, p: torch.Tensor, g: torch.Tensor, options: dict[str, Any]) -> None:
        wrong, state, beta, lr = self.defaults["mistake"], self.state[p], options["beta"], options["lr"]
        m = state.get("m", torch.zeros_like(p))
        if wrong == "state by shape":
            m = self.cache.get(p.shape, torch.zeros_like(p))
        if wrong == "state by place":
            m = self.cache.get(self.place, torch.zeros_like(p))
            m = m if m.shape == p.shape else torch.zeros_like(p)
        if wrong == "unwritten memory" and "m" not in state:
            m = torch.empty_like(p)
        m = beta * m + (1 - beta) * g
        if wrong == "bfloat16 state":
            m = m.bfloat16()
        if wrong == "bfloat16 numbers":
            m = m.bfloat16().to(p.dtype)
        state["m"] = self.cache[p.shape] = self.cache[self.place] = m
        self.place += 1
        m = m.to(p.dtype)
        if options["nesterov"] and wrong != "nesterov ignored":
            m = beta * m + (1 - beta) * g
        if wrong == "count outside the state":
            m = m / self.count
        if wrong == "bfloat16 inside" and p.dtype is torch.float32:
            m = m.bfloat16().float()
        update = lr * m.sign() * m.abs().pow(1 / 3)
        if options["weight_decay"] and wrong != "decay ignored":
            update = update + lr * options["weight_decay"] * p
        if wrong == "decay without lr":
            update = update + 1e-3 * p
        self.special(update, p, lr)
        p.sub_(update)

    def special(self, update: torch.Tensor, p: torch.Tensor, lr: float) -> None:
        """Treat some elements otherwise, as a wrong index or a wrong capacity does."""
        wrong = self.defaults["mistake"]
        if wrong == "first row skipped" and p.dim() > 1:
            update[0].zero_()
        if wrong == "last element skipped" and p.dim():
            update.view(-1)[-1].zero_()
        if wrong == "tail of a block skipped":
            update.view(-1)[update.numel() // 8 * 8 :].zero_()
        if wrong == "capacity of 4096":
            update.view(-1)[4096:].zero_()
        if wrong == "no sign for vectors" and p.dim() == 1:
            update.mul_(0.5)


class ForeignForeach(Foreign):
    """The same with a kernel of its own behind ``foreach``."""

    def __init__(self, params: Any, lr: float = 1e-3, foreach: bool = False, mistake: str = "") -> None:
        super().__init__(params, lr=lr, mistake=mistake)
        for group in self.param_groups:
            group["foreach"] = foreach
        self.defaults["foreach"] = foreach

    def options_of(self, group: dict[str, Any]) -> dict[str, Any]:
        wrong = self.defaults["mistake"] == "foreach forgets momentum" and group["foreach"]
        return {**group, "beta": 0.0} if wrong else group


class Normed(Foreign):
    """Layer-wise: each tensor's update has the norm of its weights, as LARS and LAMB have it."""

    def special(self, update: torch.Tensor, p: torch.Tensor, lr: float) -> None:
        update.mul_(lr * p.norm() / (update.norm() + 1e-12))
        super().special(update, p, lr)


class Grouped(Foreign):
    """Coupled within a group: its last largest gradient scales the next step, as AvaGrad's gamma does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            scale = group.get("largest", 1.0)
            held = [p.grad for p in group["params"] if p.grad is not None]
            group["largest"] = max((float(g.abs().max()) for g in held), default=1.0) or 1.0
            for gradient in held:
                gradient.div_(scale)
        return super().step(closure)


class Clipped(Foreign):
    """Coupled: all gradients share one norm."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held if p.grad is not None]).norm()
        for p in held:
            assert p.grad is not None
            p.grad.div_(norm)
        return super().step(closure)


class Centered(Foreign):
    """Rows are centred, as gradient centralisation does for matrices and never for vectors."""

    def gradient_of(self, p: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        g = super().gradient_of(p, options)
        return g - g.mean(dim=tuple(range(1, g.dim())), keepdim=True) if g.dim() > 1 else g


class Averaging(Foreign):
    """Keeps another point while it trains, and steps only in train mode, as Schedule-Free does."""

    def __init__(self, params: Any, lr: float = 1e-3, mistake: str = "") -> None:
        super().__init__(params, lr=lr, mistake=mistake)
        self.training = False

    def train(self) -> None:
        self.training = True

    def step(self, closure: Any = None) -> Any:
        if not self.training:
            raise RuntimeError("call optimizer.train() before optimizer.step()")
        return super().step(closure)


class Closured(Foreign):
    """Needs the loss twice, as SAM does."""

    def step(self, closure: Any) -> Any:
        if closure is None:
            raise ValueError("needs a closure")
        torch.enable_grad()(closure)()
        return super().step(closure)


class Curved(Foreign):
    """Needs gradients that can be differentiated again, as AdaHessian does."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    with torch.enable_grad():
                        (curve,) = torch.autograd.grad(p.grad.sum(), p, retain_graph=True)
                    p.grad = p.grad.detach() / (1.0 + curve.abs())
        return super().step(closure)


class Flagged(Foreign):
    """Its mistake is a constructor's flag that is in no option."""

    def __init__(self, params: Any, lr: float = 1e-3, shares: bool = False) -> None:
        super().__init__(params, lr=lr)
        self.shares = shares

    def options_of(self, group: dict[str, Any]) -> dict[str, Any]:
        return self.param_groups[0] if self.shares else group


class Counting(Foreign):
    """Counts in its groups, as Schedule-Free does, and has no moments before its first step."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["k"] = 0

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if group["k"] and p.grad is not None and group["k"] < 3 and "m" not in self.state[p]:
                    raise KeyError("m")
            group["k"] += 1
        return super().step(closure)


class Masked(Foreign):
    """Files a mask by tensor when it is built, as SaRA does: a copy on other tensors has none."""

    def __init__(self, params: Any, lr: float = 1e-3, mistake: str = "") -> None:
        super().__init__(params, lr=lr, mistake=mistake)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mask"] = torch.ones_like(p, dtype=torch.bool)

    def gradient_of(self, p: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        return super().gradient_of(p, options) * self.state[p]["mask"]
