"""Which arithmetic an operation ran in: under torch's own switches, old and new, and autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from audits.lanes import precision
from audits.lanes.precision import Observing, Product, arithmetic, float32_precision, full_float32, product_of
from tests.audits.tf32 import allowed, switches_kept

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture(autouse=True)
def _switches() -> Iterator[None]:
    with switches_kept():
        yield


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that knows TF32."""
    monkeypatch.setattr(precision, "_has_tf32", lambda device: True)


def _answers(device: torch.device) -> dict[str, str]:
    return {product.value: float32_precision(device, product) for product in Product}


def _set(path: str, value: object) -> Callable[[], None]:
    *way, name = path.split(".")

    def act() -> None:
        place = torch.backends
        for step in way:
            place = getattr(place, step)
        setattr(place, name, value)

    return act


@pytest.mark.usefixtures("ampere")
@pytest.mark.parametrize(("change", "expected"), [
    (lambda: None, {"matmul": "ieee", "conv": "tf32", "rnn": "tf32"}),  # torch's defaults
    (_set("cuda.matmul.allow_tf32", True), {"matmul": "tf32", "conv": "tf32", "rnn": "tf32"}),
    (_set("cuda.matmul.fp32_precision", "tf32"), {"matmul": "tf32", "conv": "tf32", "rnn": "tf32"}),
    (lambda: torch.set_float32_matmul_precision("high"), {"matmul": "tf32", "conv": "tf32", "rnn": "tf32"}),
    (_set("cudnn.conv.fp32_precision", "ieee"), {"matmul": "ieee", "conv": "ieee", "rnn": "tf32"}),
    (_set("cudnn.rnn.fp32_precision", "ieee"), {"matmul": "ieee", "conv": "tf32", "rnn": "ieee"}),
])  # fmt: skip
def test_cuda_follows_old_and_new_switches(change: Callable[[], None], expected: dict[str, str]) -> None:
    change()
    assert _answers(CUDA) == expected


@pytest.mark.usefixtures("ampere")
def test_tf32_switched_off_as_a_whole() -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, fp32_precision=None):
        assert _answers(CUDA) == dict.fromkeys(("matmul", "conv", "rnn"), "ieee")


@pytest.mark.usefixtures("ampere")
def test_a_mix_of_names_that_torch_refuses_to_read_is_read() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    with pytest.raises(RuntimeError, match="allow_tf32"):
        _ = torch.backends.cuda.matmul.allow_tf32
    assert float32_precision(CUDA, Product.MATMUL) == "ieee"


@pytest.mark.usefixtures("ampere")
def test_the_environment_overrules_the_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert set(_answers(CUDA).values()) == {"ieee"}


def test_a_gpu_without_tf32_and_other_devices_know_none() -> None:
    if not torch.cuda.is_available():
        assert set(_answers(CUDA).values()) == {"ieee"}
    assert set(_answers(torch.device("meta")).values()) == {"ieee"}


def test_onednn_on_a_cpu_follows_its_own_switches() -> None:
    assert set(_answers(CPU).values()) == {"ieee"}
    torch.set_float32_matmul_precision("medium")
    assert _answers(CPU) == {"matmul": "bf16", "conv": "ieee", "rnn": "ieee"}
    torch.backends.mkldnn.conv.fp32_precision = "tf32"
    assert _answers(CPU) == {"matmul": "bf16", "conv": "tf32", "rnn": "ieee"}


class _OldBackend:
    """A backend module of a torch before 2.9."""

    class _Matmul:
        allow_tf32 = True

    matmul = _Matmul
    allow_tf32 = False


@pytest.mark.usefixtures("ampere")
def test_an_older_torch_is_asked_by_the_old_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends, "cuda", _OldBackend)
    monkeypatch.setattr(torch.backends, "cudnn", _OldBackend)
    assert _answers(CUDA) == {"matmul": "tf32", "conv": "tf32", "rnn": "ieee"}  # a convolution may fall back to cuBLAS


@pytest.mark.usefixtures("ampere")
def test_float32_as_an_instrument_runs_in_float32_and_the_switches_come_back() -> None:
    torch.set_float32_matmul_precision("medium")
    before = _answers(CUDA), _answers(CPU)
    with full_float32():
        assert set(_answers(CUDA).values()) == set(_answers(CPU).values()) == {"ieee"}
    assert (_answers(CUDA), _answers(CPU)) == before
    assert torch.backends.cuda.matmul.allow_tf32  # the old names can be read again


@pytest.mark.parametrize(("operation", "product"), [
    ("mm", Product.MATMUL), ("_scaled_dot_product_efficient_attention_backward", Product.MATMUL),
    ("linalg_solve_ex", Product.MATMUL), ("convolution", Product.CONVOLUTION),
    ("convolution_backward", Product.CONVOLUTION), ("_slow_conv2d_forward", Product.CONVOLUTION),
    ("_cudnn_rnn", Product.RECURRENT), ("_cudnn_rnn_backward", Product.RECURRENT),
    ("mkldnn_rnn_layer", Product.RECURRENT), ("native_layer_norm", None), ("_thnn_fused_lstm_cell", None),
    ("embedding", None), ("_to_copy", None),
])  # fmt: skip
def test_products_are_known_by_name(operation: str, product: Product | None) -> None:
    assert product_of(operation) is product


def test_the_eps_of_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(monkeypatch, Product.CONVOLUTION)
    conv = arithmetic("convolution", torch.float32, CUDA)
    assert (conv.roundoff, str(conv)) == (2.0**-11, "torch.float32 (tf32)")
    assert arithmetic("mm", torch.float32, CUDA).eps == torch.finfo(torch.float32).eps
    assert arithmetic("native_layer_norm", torch.float32, CUDA).inside is None
    assert arithmetic("convolution", torch.float64, CUDA).eps == torch.finfo(torch.float64).eps
    assert arithmetic("convolution", torch.bfloat16, CUDA).eps == torch.finfo(torch.bfloat16).eps
    under = arithmetic("mm", torch.float32, CUDA, autocast=torch.bfloat16)
    assert (under.dtype, under.eps) == (torch.bfloat16, torch.finfo(torch.bfloat16).eps)
    assert arithmetic("native_layer_norm", torch.float32, CUDA, autocast=torch.bfloat16).dtype is torch.float32


def test_sums_in_float16_round_at_every_addition(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arithmetic("mm", torch.float16, CUDA, length=1024).inside is None
    monkeypatch.setattr(precision, "_adds_in_float16", lambda: True)
    found = arithmetic("mm", torch.float16, CUDA, length=1024)
    assert found.eps == 32 * torch.finfo(torch.float16).eps
    assert "accumulation" in str(found)
    assert arithmetic("mm", torch.bfloat16, CUDA, length=1024).inside is None


def test_products_inside_an_operation_are_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed(monkeypatch, Product.MATMUL)
    x = torch.randn(4, 4, requires_grad=True)
    with Observing() as nothing:
        x.exp().sum().backward()
    assert nothing.found is None
    with Observing() as backward_only:
        torch.linalg.inv(x).sum().backward()
    assert backward_only.found is not None
    assert backward_only.found.inside == "tf32"
