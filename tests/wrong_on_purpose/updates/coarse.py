"""AdamW with a state coarser than the weights, as its name or an option declares, each with mistakes to switch on."""

from __future__ import annotations

from typing import Any

import torch

#: What goes wrong; correct with ``mistake=""``.
MISTAKES = ("decay missing", "decay coupled", "bias not corrected", "first group's options", "state by shape",
            "tail skipped", "ascends")  # fmt: skip


class AdamW8bit(torch.optim.Optimizer):
    """Moments in 8 bits, in blocks that share a scale; the second one as its root."""

    block = 64
    made_of_what_is_kept = False

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: Any = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.1,
        mistake: str = "",
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.mistake = mistake
        self.shared: dict[Any, Any] = {}

    def held(self, state: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        """Return a moment, or zeros, in the weights' dtype."""
        if name not in state:
            return torch.zeros_like(like)
        codes, scales = state[name].float(), state[f"{name}_scale"]
        full = (codes.view(len(scales), -1) / 127 * scales[:, None].float()).view(-1)
        return full[: like.numel()].view(like.shape).to(like.dtype)

    def keep(self, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
        """Store a moment."""
        flat = torch.nn.functional.pad(value.float().reshape(-1), (0, -value.numel() % self.block)).view(-1, self.block)
        scales = flat.abs().amax(dim=1)
        state[name] = (flat / scales.clamp(min=1e-30)[:, None] * 127).round().to(torch.int8).view(-1)
        state[f"{name}_scale"] = scales

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        wrong = self.mistake
        for group in self.param_groups:
            chosen = self.param_groups[0] if wrong == "first group's options" else group
            lr, decay, eps, (b1, b2) = chosen["lr"], chosen["weight_decay"], chosen["eps"], chosen["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.shared.setdefault(p.shape, {}) if wrong == "state by shape" else self.state[p]
                g = p.grad + decay * p if wrong == "decay coupled" else p.grad
                g = -g if wrong == "ascends" else g
                t = state["step"] = state.get("step", 0) + 1
                m = b1 * self.held(state, "m", p) + (1 - b1) * g
                root = (b2 * self.held(state, "r", p) ** 2 + (1 - b2) * g * g).sqrt()
                self.keep(state, "m", m)
                self.keep(state, "r", root)
                if self.made_of_what_is_kept:
                    m, root = self.held(state, "m", p), self.held(state, "r", p)
                first, second = (1.0, 1.0) if wrong == "bias not corrected" else (1 - b1**t, 1 - b2**t)
                update = (m / first) / (root / second**0.5 + eps)
                if wrong == "tail skipped":
                    update.view(-1)[update.numel() // 8 * 8 :] = 0.0
                if wrong not in ("decay missing", "decay coupled"):
                    p.mul_(1 - lr * decay)
                p.sub_(lr * update)

    def load_state_dict(self, state_dict: Any) -> None:
        """Keep the codes as they are: torch loads state in the weights' dtype."""
        super().load_state_dict(state_dict)
        held = [p for group in self.param_groups for p in group["params"]]
        for key, saved in state_dict["state"].items():
            self.state[held[key]].update({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in saved.items()})


class CoarseAdamW(AdamW8bit):
    """Moments in ``state_dtype``; what is stored is what the step is made of."""

    made_of_what_is_kept = True

    def __init__(self, params: Any, state_dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
        super().__init__(params, **options)
        self.state_dtype = state_dtype

    def held(self, state: dict[str, Any], name: str, like: torch.Tensor) -> torch.Tensor:
        return state[name].to(like.dtype) if name in state else torch.zeros_like(like)

    def keep(self, state: dict[str, Any], name: str, value: torch.Tensor) -> None:
        state[name] = value.to(self.state_dtype)


CoarseAdamW.__name__ = "AdamW"  # found by its name; the option declares the state


class CoarseAncestor(torch.optim.AdamW):
    """A subclass of torch's with both moments in bfloat16, which the step is made of."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.1, mistake: str = "",
                 moments_dtype: torch.dtype = torch.bfloat16) -> None:  # fmt: skip
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.mistake, self.moments_dtype = mistake, moments_dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        wrong = self.mistake
        for group in self.param_groups:
            chosen = self.param_groups[0] if wrong == "first group's options" else group
            lr, decay, eps, (b1, b2) = chosen["lr"], chosen["weight_decay"], chosen["eps"], chosen["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                g = p.grad + decay * p if wrong == "decay coupled" else p.grad
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(p, dtype=self.moments_dtype),
                                 exp_avg_sq=torch.zeros_like(p, dtype=self.moments_dtype))  # fmt: skip
                state["step"] += 1
                t = float(state["step"])
                state["exp_avg"].copy_(b1 * state["exp_avg"].to(p.dtype) + (1 - b1) * g)
                state["exp_avg_sq"].copy_(b2 * state["exp_avg_sq"].to(p.dtype) + (1 - b2) * g * g)
                m, v = (state[key].to(p.dtype) for key in ("exp_avg", "exp_avg_sq"))
                first, second = (1.0, 1.0) if wrong == "bias not corrected" else (1 - b1**t, 1 - b2**t)
                if wrong not in ("decay missing", "decay coupled"):
                    p.mul_(1 - lr * decay)
                p.sub_(lr * (m / first) / ((v / second).sqrt() + eps))


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of the weights, which are the copies' rounding."""

    def __init__(self, params: Any, lr: float = 1e-2, weight_decay: float = 0.1, mistake: str = "") -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.mistake = mistake

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        wrong = self.mistake
        for group in self.param_groups:
            lr, decay, eps, (b1, b2) = group["lr"], group["weight_decay"], group["eps"], group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state, g = self.state[p], p.grad.float()
                if not state:
                    state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g),
                                 master=p.float().clone())  # fmt: skip
                state["step"] += 1
                t, w = float(state["step"]), state["master"]
                if wrong == "copy follows the weights":
                    w.copy_(p)
                state["exp_avg"].lerp_(g, 1 - b1)
                state["exp_avg_sq"].mul_(b2).addcmul_(g, g, value=1 - b2)
                if wrong != "decay missing":
                    w.mul_(1 - lr * decay)
                second = 1.0 if wrong == "bias not corrected" else 1 - b2**t
                w.addcdiv_(state["exp_avg"], (state["exp_avg_sq"] / second).sqrt() + eps, value=-lr / (1 - b1**t))
                p.copy_(w)

    def load_state_dict(self, state_dict: Any) -> None:
        """Keep the state as it is: torch loads it in the weights' dtype."""
        super().load_state_dict(state_dict)
        held = [p for group in self.param_groups for p in group["params"]]
        for key, saved in state_dict["state"].items():
            self.state[held[key]].update({k: v.clone() for k, v in saved.items()})
