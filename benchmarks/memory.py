"""Bytes a parameter at the peak of a training step, of the audit's parts, and of all of it; a process each.

On the CPU the process's peak resident memory above what stood when model, batch and recipe were there and had been
audited by nobody; on CUDA torch's peak of allocated memory above the same. The weights of the model itself are not in
it. Without ``--part`` every part is measured, one child process after the other::

    python -m benchmarks.memory --params 124M --dtype float32 --optimizer adamw
    python -m benchmarks.memory --params 500M --dtype bfloat16 --part gradient

What is audited is a live model, so the copy that is worked on, and the one from which it is put back, are part of the
audit's peak. The first call of everything that allocates once and for all (thread pools, kernels) is made before.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits import AuditSettings, Recipe, audit
from audits.gradients import check_gradients
from audits.lanes.separation import find_weighings
from audits.live.subject import open_subject
from audits.updates import check_registration, check_updates
from benchmarks.gpu.opaque import token_loss
from benchmarks.gpu.sizes import Gpt2, Llama

#: Parameters -> the layout: GPT-2's (width, layers, heads, vocabulary, length), or Llama's (width, layers, heads,
#: shared, inner, vocabulary).
LAYOUTS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "40k": (Gpt2, (32, 2, 2, 256, 64)),
    "4M": (Gpt2, (192, 8, 4, 2048, 128)),
    "124M": (Gpt2, (768, 12, 12, 50257, 1024)),
    "500M": (Llama, (1280, 20, 20, 5, 4480, 32000)),
    "1.1G": (Llama, (2048, 16, 32, 8, 8192, 32000)),
}

PARTS = ("training", "gradient", "update", "audit")

_BUILDS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=1e-4),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4),
    "adamw-fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-4),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-4),
}


class Peak:
    """The peak of memory since it was made: of the process on the CPU, of torch's allocations on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        if device.type != "cpu":
            module = torch.get_device_module(device)
            module.synchronize()
            module.reset_peak_memory_stats()
            self.base = int(module.memory_allocated())
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier work left in the heap would hide as much of what comes
            Path("/proc/self/clear_refs").write_text("5")
            self.base = status("VmRSS")

    def taken(self) -> int:
        """Return the bytes of the peak above where it began."""
        if self._device.type != "cpu":
            module = torch.get_device_module(self._device)
            module.synchronize()
            return int(module.max_memory_allocated()) - self.base
        return status("VmHWM") - self.base


def status(field: str) -> int:
    """Return a field of this process's status, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


class Timeline:
    """Prints the resident memory while it runs, to see where a peak stands."""

    def __init__(self, count: int) -> None:
        self._count, self._done = count, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> None:
        self._base, self._began = status("VmRSS"), time.perf_counter()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        highest = 0.0
        main = threading.main_thread().ident
        assert main is not None
        while not self._done.wait(0.02):
            held = (status("VmRSS") - self._base) / self._count
            if held > highest + 0.5:
                highest = held
                frames = []
                frame = sys._current_frames().get(main)
                while frame is not None:
                    if "/audits/" in frame.f_code.co_filename:
                        frames.append(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}:{frame.f_lineno}")
                    frame = frame.f_back
                print(
                    f"{time.perf_counter() - self._began:7.2f} s {held:6.1f}  {' < '.join(frames[:9])}", file=sys.stderr
                )


def made(params: str, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return the model of a layout and a batch of one short sequence: activations are small beside the weights."""
    kind, layout = LAYOUTS[params]
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)  # never in float32 first: the peak would be that of building it
    try:
        with torch.device(device):
            model = kind(*layout)
    finally:
        torch.set_default_dtype(torch.float32)
    vocabulary = layout[3] if kind is Gpt2 else layout[-1]
    tokens = torch.randint(0, vocabulary, (1, 33), device=device)
    return model, {"x": tokens[:, :-1], "y": tokens[:, 1:]}


def train(model: nn.Module, batch: dict[str, torch.Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Two training steps."""
    for _ in range(2):
        optimizer.zero_grad()
        token_loss(model, batch).backward()
        optimizer.step()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one part in this process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(arguments.threads)
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    build = _BUILDS[arguments.optimizer]
    small, tokens = made("40k", dtype, device)  # what is allocated once and for all
    train(small, tokens, build(small.parameters()))
    if arguments.part != "training":
        recipe = Recipe.capture(small, batch=tokens, loss=token_loss, optimizer=build(small.parameters()))
        audit(small, recipe, device=str(device), settings=AuditSettings(checks=("registration.*",)))
    del small, tokens
    model, batch = made(arguments.params, dtype, device)
    optimizer = build(model.parameters())
    if arguments.state:
        train(model, batch, optimizer)
        optimizer.zero_grad()
    count = sum(p.numel() for p in model.parameters())
    outcome = ""
    if arguments.part == "training":
        peak, began = Peak(device), time.perf_counter()
        train(model, batch, optimizer)
    else:
        recipe = Recipe.capture(model, batch=batch, loss=token_loss, optimizer=optimizer)
        settings = AuditSettings()
        peak, began = Peak(device), time.perf_counter()
        with Timeline(count) if arguments.timeline else warnings.catch_warnings():
            outcome = audited(arguments.part, model, recipe, settings, str(device))
    return {
        "part": arguments.part,
        "count": count,
        "bytes": peak.taken(),
        "seconds": time.perf_counter() - began,
        "largest": max(p.numel() for p in model.parameters()),
        "weights": sum(p.numel() * p.element_size() for p in model.parameters()),
        "base": peak.base,
        "outcome": outcome,
    }


def audited(part: str, model: nn.Module, recipe: Recipe, settings: AuditSettings, device: str) -> str:
    """Run one part, or the whole audit, and return how it ended."""
    if part == "audit":
        return audit(model, recipe, settings=settings, device=device).outcome.value
    with open_subject(model, recipe, settings, device) as subject:
        find_weighings(subject)
        if part == "gradient":
            rows = check_gradients(subject)
        else:
            rows = [*check_registration(subject), *check_updates(subject)]
        kinds = {"fail", "warn", "inconclusive"} & {row.outcome.value for row in rows}
        return " ".join(sorted(kinds)) or "pass"


def in_child(arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """Measure one part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", "--part", part, "--params", arguments.params]
    for name in ("dtype", "optimizer", "device"):
        command += [f"--{name}", getattr(arguments, name)]
    command += ["--threads", str(arguments.threads)]
    command += [f"--{name}" for name in ("state", "timeline") if getattr(arguments, name)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    if done.returncode:
        return {"part": part, "failed": done.returncode}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def line(found: dict[str, Any]) -> str:
    """Return a table's line."""
    if "failed" in found:
        return f"{found['part']:>9}  ended with {found['failed']}"
    return (
        f"{found['part']:>9} {found['bytes'] / found['count']:>18.1f} {found['weights'] / found['count']:>10.1f}"
        f" {found['bytes'] / 2**30:>7.2f} {found['largest'] * 8 / found['count']:>17.1f} {found['seconds']:>8.1f}"
        f"  {found['outcome']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", nargs="?", default="124M", choices=list(LAYOUTS))
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--optimizer", default="adamw", choices=list(_BUILDS))
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--state", action="store_true", help="capture after two steps, with the optimizer's state")
    parser.add_argument("--timeline", action="store_true", help="print to stderr where the resident memory rose")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        arguments.part = arguments.part[0]
        print(json.dumps(measure(arguments)))
        return
    print(f"torch {torch.__version__}, {arguments.params}, {arguments.dtype}, {arguments.optimizer},"
          f" {arguments.device}{', captured with state' if arguments.state else ''}")  # fmt: skip
    print(f"{'part':>9} {'bytes a parameter':>18} {'+ weights':>10} {'GiB':>7} {'largest, float64':>17} {'seconds':>8}")
    for part in arguments.part:
        print(line(in_child(arguments, part)), flush=True)


if __name__ == "__main__":
    main()
