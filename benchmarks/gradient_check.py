"""Time and detection of the gradient check against its rivals, on the same float64 losses, in one run.

    python benchmarks/gradient_check.py [--gpt2] [--slow]

Rivals: `torch.autograd.gradcheck` in its fast mode and in its slow one, and the tutorial's loop over every element
(both loops measured on a part of the elements and scaled up where ``*``). Times are medians of three, of one for a
rival that takes minutes; ratios come from one run; forward-equivalents count a forward plus backward as 3.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault(
    "THP_MEM_ALLOC_ENABLE", "1"
)  # as an audit's process has it; torch reads it at its first allocation

import torch
from torch import nn
from torch.nn import functional as F

from audits.gradients.methods.batched import vmap_holds
from audits.gradients.methods.certify import Certifier
from audits.gradients.methods.exact import check_exactly
from audits.lanes import lifted_loss
from audits.lanes.directions import NOWHERE
from audits.lanes.evaluation import Point
from audits.lanes.problem import Problem
from audits.live.subject import open_subject
from audits.outcomes import Outcome
from audits.recipe.recipe import Recipe

Loss = Callable[[nn.Module, Any], torch.Tensor]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Gpt(nn.Module):
    """GPT-2's layout, tied head."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.tokens(x) + self.places.weight[: x.shape[1]]
        return self.norm(self.blocks(h)) @ self.tokens.weight.T


def token_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]).flatten(0, 1), batch["y"].flatten())


def class_loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def mlp() -> tuple[nn.Module, Any, Loss]:
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 36), nn.Tanh(), nn.Linear(36, 10))
    return model, {"x": torch.randn(32, 64), "y": torch.randint(0, 10, (32,))}, class_loss


def cnn() -> tuple[nn.Module, Any, Loss]:
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    return model, {"x": torch.rand(32, 1, 8, 8), "y": torch.randint(0, 10, (32,))}, class_loss


def small_gpt() -> tuple[nn.Module, Any, Loss]:
    x = torch.randint(0, 512, (2, 32))
    return Gpt(512, 128, 4, 4, 64), {"x": x, "y": x.roll(-1, 1)}, token_loss


def gpt2() -> tuple[nn.Module, Any, Loss]:
    x = torch.randint(0, 50257, (1, 32))
    return Gpt(50257, 768, 12, 12, 1024), {"x": x, "y": x.roll(-1, 1)}, token_loss


def timed(function: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    times, result = [], None
    for _ in range(repeats):
        started = time.perf_counter()
        result = function()
        times.append(time.perf_counter() - started)
    return statistics.median(times), result


# On a failure the fast mode runs the slow one over every element, only to word its message: hours on a GPT.
sys.modules["torch.autograd.gradcheck"]._run_slow_mode_and_get_error = lambda *_, **__: "not looked for"  # type: ignore[attr-defined]


def gradcheck(problem: Problem, fast: bool, undefined: bool = True) -> bool:
    tensors = tuple(problem.tensors.values())

    def function(*_: torch.Tensor) -> torch.Tensor:
        problem.before()
        return problem.loss()

    return torch.autograd.gradcheck(
        function, tensors, fast_mode=fast, raise_exception=False, check_undefined_grad=undefined
    )


def tutorial(problem: Problem, point: Point, elements: int) -> float:
    """Return the seconds for a part of the elements, scaled to all."""
    total = sum(t.numel() for t in problem.tensors.values())
    started = time.perf_counter()
    for i in range(elements):
        name = list(problem.tensors)[i % len(problem.tensors)]
        flat = problem.tensors[name].data.view(-1)
        for sign in (1, -1):
            flat[i % flat.numel()] += sign * 1e-7
            problem.before()
            problem.loss().item()
            flat[i % flat.numel()] -= sign * 1e-7
    point.settle()
    return (time.perf_counter() - started) * total / elements


def bench(name: str, make: Callable[[], tuple[nn.Module, Any, Loss]], repeats: int, slow: bool) -> None:
    torch.manual_seed(0)
    model, batch, loss = make()
    recipe = Recipe.capture(model, batch=batch, loss=loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with open_subject(model, recipe, device="cpu") as subject, lifted_loss(subject, subject.phases[0]) as problem:
        names = list(problem.tensors)
        elements = sum(t.numel() for t in problem.tensors.values())

        def probe() -> Certifier:
            certifier = Certifier(problem, seed=0, probes=2, detection_limit=1e-3)
            certifier.run(names)
            return certifier

        def forward() -> None:
            problem.before()
            problem.loss()

        def backward() -> None:
            problem.before()
            problem.loss().backward()
            for tensor in problem.tensors.values():
                tensor.grad = None

        plain, _ = timed(forward, max(repeats, 3))
        both, _ = timed(backward, max(repeats, 3))
        ours, certifier = timed(probe, repeats)
        passed = all(v.outcome is Outcome.PASS for v in certifier.verdicts.values())
        point = Point(problem)
        one, _ = timed(lambda: point.along(NOWHERE, 0.0), max(repeats, 3))
        evaluations = certifier.evaluations
        print(f"\n{name}: {elements:,} elements in {len(names)} tensors; F {1e3 * plain:.2f} ms, G {1e3 * both:.2f} ms,"
              f" E/F {one / plain:.2f}")  # fmt: skip
        print(
            f"  probe             {ours:10.3f} s   {evaluations} E + G = {ours / plain:.0f} F   all pass: {passed}",
            flush=True,
        )
        point.restore()
        rival, verdict = timed(lambda: gradcheck(problem, True), 1 if elements > 1e7 else repeats)
        print(f"  gradcheck fast    {rival:10.3f} s   {rival / ours:.1f} times ours   passes: {verdict}", flush=True)
        if slow and elements < 5e4:
            holds = vmap_holds(point, names)
            exact, found = timed(lambda: check_exactly(point, names, detection_limit=1e-3), repeats)
            agree = sum(v.outcome is Outcome.PASS for v in found.values())
            point.restore()
            rival, verdict = timed(lambda: gradcheck(problem, False), repeats)
            print(f"  exact             {exact:10.3f} s   {'vmap' if holds else 'loop'}, {agree} of {len(names)} pass")
            print(
                f"  gradcheck slow    {rival:10.3f} s   {rival / exact:.1f} times exact   passes: {verdict}", flush=True
            )
        part = min(elements, 400 if elements < 1e6 else 4)
        print(f"  tutorial's loop   {tutorial(problem, point, part):10.3f} s * scaled from {part} elements", flush=True)
        point.restore()
        if elements < 1e8:
            detection(problem, names)
        else:
            what_gradcheck_passes(problem, names)


def detection(problem: Problem, names: list[str]) -> None:
    """Plant errors by hooks: which are found by us and by gradcheck."""
    print("  planted on the middle tensor:    ours   gradcheck fast")
    name = names[len(names) // 2]
    tensor = problem.tensors[name]
    element = tensor.numel() // 3

    def one(gradient: torch.Tensor) -> torch.Tensor:
        flipped = gradient.clone()
        flipped.view(-1)[element] *= -1
        return flipped

    plants: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "x 1.00001": lambda g: 1.00001 * g,
        "x 1.001": lambda g: 1.001 * g,
        "x 1.01": lambda g: 1.01 * g,
        "x 0": lambda g: 0.0 * g,
        "one sign flipped": one,
    }
    for what, plant in plants.items():
        handle = tensor.register_hook(plant)
        found = theirs = 0
        draws = 5
        for seed in range(draws):
            certifier = Certifier(problem, seed=seed, probes=2, detection_limit=1e-3)
            certifier.run(names)
            found += certifier.verdicts[name].outcome is Outcome.FAIL
            torch.manual_seed(seed)
            theirs += not gradcheck(problem, True, undefined=False)  # undefined gradients are no argument of a hook
        handle.remove()
        print(f"    {what:24s} {found:>6d}/{draws} {theirs:>10d}/{draws}", flush=True)


def what_gradcheck_passes(problem: Problem, names: list[str]) -> None:
    """Plant 1.01 and all-zero gradients where gradcheck's absolute tolerance drowns them."""
    for what, factor in (("all gradients x 1.01", 1.01), ("all gradients x 0", 0.0)):
        handles = [t.register_hook(lambda g, f=factor: f * g) for t in problem.tensors.values()]
        theirs = gradcheck(problem, True, undefined=False)
        certifier = Certifier(problem, seed=0, probes=2, detection_limit=1e-3)
        chosen = names[-1:]
        certifier.run(chosen)
        ours = certifier.verdicts[chosen[0]].outcome
        for handle in handles:
            handle.remove()
        print(
            f"  {what}: gradcheck fast {'passes' if theirs else 'fails'} it, ours says {ours} ({chosen[0]})", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpt2", action="store_true", help="also GPT-2 small's layout, 124 M parameters")
    parser.add_argument("--only", default="", help="only the models whose name contains this")
    parser.add_argument("--slow", action="store_true", help="also exact mode against gradcheck's slow mode")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import warnings

    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {platform.machine()}, {platform.processor() or 'CPU'}, 1 thread, float64")
    models = {"10k MLP": mlp, "10k CNN (BatchNorm in train mode)": cnn, "0.9 M GPT": small_gpt}
    if options.gpt2:
        models["GPT-2 small"] = gpt2
    for name, make in models.items():
        if options.only in name:
            bench(name, make, 3, options.slow)


if __name__ == "__main__":
    main()
