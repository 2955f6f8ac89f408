"""Memory that runs out, for real: the child is killed at its limit, a smaller probe judges, the report says so."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from audits.outcomes import Outcome, ResultRow
from audits.run import refused
from audits.settings import AuditSettings
from flows.choosing.sweeping import Stopped
from flows.one_audit import gpu
from flows.one_audit.fallback import MemoryPlan, memory_plans, out_of_memory, with_fallback_note
from flows.one_audit.gpu import Gpu, chosen_gpu, held, parsed
from flows.one_audit.memory_need import needed
from flows.one_audit.one_version import audit_directory
from flows.settings.environment import GradauditSettings
from registry_models.artifacts.snapshot import read_snapshot
from registry_models.reference.reference_files import write_reference
from tests.flows.planted import write_wide

LISTING = """0, GPU-aaaa-1, 81559
1, GPU-bbbb-2, [N/A]
"""


@pytest.mark.end_to_end
def test_a_memory_limit_that_bites_leads_to_a_smaller_probe(tmp_path: Path) -> None:
    settings = GradauditSettings.load(memory_limit=0.75, device="cpu")
    report = audit_directory(write_wide(tmp_path / "model"), settings)
    assert report.outcome is Outcome.PASS, report.headline
    assert report.coverage == 1.0
    assert report.limits[-1] == "Audited on the CPU with a smaller probe: memory ran out on the CPU."
    assert "smaller probe" in report.headline
    assert {"check": "audit.completed", "reason": report.limits[-1][:-1].replace("A", "a", 1)} in report.not_checked


def test_a_gpu_s_memory_is_asked_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = read_snapshot(write_reference(tmp_path / "model"))
    need = needed(snapshot)
    asked = AuditSettings()

    def names(memory: int | None) -> list[tuple[str, str, str]]:
        monkeypatch.setattr(gpu, "host_gpus", lambda: (Gpu("GPU-a", memory),))
        return [(plan.device, plan.settings.method, reason) for plan, reason in memory_plans(snapshot, "auto", asked)]

    assert names(need.total) == [
        ("auto", "auto", ""),
        ("cpu", "auto", "memory ran out on the GPU (auto)"),
        ("cpu", "probe", "memory ran out on the CPU"),
    ]
    assert [device for device, _, _ in names(None)] == ["auto", "cpu", "cpu"]
    device, _, reason = names(need.total - 1)[0]
    assert device == "cpu"
    assert reason == f"it needs at least 1.0 GiB, the GPU has 1.0 GiB ({need.text})"
    assert "AdamW" in need.text
    assert [plan.device for plan, _ in memory_plans(snapshot, "cpu", asked)] == ["cpu", "cpu"]
    smallest = AuditSettings(method="probe", input_gradient_limit=0)
    assert len(list(memory_plans(snapshot, "cpu", smallest))) == 1, "there is nothing smaller"


def test_only_memory_is_a_reason_to_try_again() -> None:
    assert out_of_memory(refused("x", cause="memory limit"))
    assert out_of_memory(refused("x", cause="out of memory"))
    assert not out_of_memory(refused("x", cause="crashed"))
    part = ResultRow(check="audit.completed", outcome=Outcome.INCONCLUSIVE, cause="out of memory")
    report = dataclasses.replace(refused("x"), rows=(ResultRow(check="update.rule", outcome=Outcome.PASS), part))
    assert out_of_memory(report), "one part that ran out is enough"
    assert with_fallback_note(report, MemoryPlan("cpu", AuditSettings(), "the CPU"), []) is report


def test_a_gpu_is_known_by_its_own_id(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = parsed(LISTING)
    assert (first.uuid, first.memory_bytes, second.memory_bytes) == ("GPU-aaaa-1", 81559 * 2**20, None)
    monkeypatch.setattr(gpu, "host_gpus", lambda: (first, second))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert chosen_gpu("auto") == chosen_gpu("cuda") == chosen_gpu("cuda:0") == first
    assert chosen_gpu("cuda:1") == second
    assert chosen_gpu("cpu") is None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert chosen_gpu("auto") == chosen_gpu("cuda:0") == second
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bbbb")
    assert chosen_gpu("auto") == second, "an id may be shortened"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-cccc")
    assert chosen_gpu("auto") == Gpu("MIG-cccc")
    for nothing in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", nothing)
        assert chosen_gpu("auto") is None
    monkeypatch.setattr(gpu, "host_gpus", lambda: ())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert chosen_gpu("auto") is None


_HOLD = """
import sys, threading, time
from flows.one_audit import gpu
from flows.settings.environment import GradauditSettings
gpu.host_gpus = lambda: (gpu.Gpu("GPU-a"), gpu.Gpu("GPU-b"))
with gpu.held(sys.argv[1], GradauditSettings.load(), threading.Event()):
    print("held", time.monotonic(), flush=True)
    time.sleep(float(sys.argv[2]))
    print("left", time.monotonic(), flush=True)
"""


@pytest.mark.end_to_end
def test_a_gpu_belongs_to_one_audit_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADAUDIT_STATE", str(tmp_path / "state"))

    def hold(device: str, seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _HOLD, device, str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def times(process: subprocess.Popen[str]) -> list[float]:
        return [float(line.split()[1]) for line in process.communicate(timeout=60)[0].splitlines()]

    same, again, other = hold("cuda:0", 1.0), hold("cuda:0", 1.0), hold("cuda:1", 1.0)
    first, second = sorted([times(same), times(again)])
    assert first[1] <= second[0], "one after the other"
    assert len(times(other)) == 2
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert {"gpu-GPU-a.lock", "gpu-GPU-b.lock"} <= names
    killed = hold("cuda:0", 60.0)
    assert killed.stdout is not None
    killed.stdout.readline()
    killed.kill()
    killed.communicate()
    assert len(times(hold("cuda:0", 0.0))) == 2, "a killed holder leaves the GPU free"


def test_a_stopped_sweep_waits_for_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GradauditSettings.load(state=str(tmp_path / "state"))
    monkeypatch.setattr(gpu, "host_gpus", lambda: (Gpu("GPU-a"),))
    stopping, ended = threading.Event(), threading.Event()

    def wait() -> None:
        try:
            with held("cuda:0", settings, stopping):
                raise AssertionError("somebody else holds it")
        except Stopped:
            ended.set()

    with held("cuda:0", settings, threading.Event()):
        waiting = threading.Thread(target=wait)
        waiting.start()
        time.sleep(0.2)
        stopping.set()
        assert ended.wait(10)
        waiting.join()


@pytest.mark.gpu
def test_the_reference_model_is_judged_on_a_gpu(tmp_path: Path) -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    from flows.one_audit.canary import prove_environment

    prove_environment(GradauditSettings.load(device="cuda", state=str(tmp_path / "state")))
    (stamp,) = (tmp_path / "state").glob("canary-*.json")
    assert "cpu" not in stamp.read_text()
