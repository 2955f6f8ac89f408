"""The emulated device itself: as strict as a GPU, and with the CPU's results."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.accelerator import NAME

pytestmark = pytest.mark.accelerator


def test_tensors_of_two_devices_do_not_mix() -> None:
    x = torch.randn(3, 4, device=NAME)
    for other in (lambda: x + torch.ones(3, 4), lambda: x @ torch.ones(4, 2), lambda: torch.equal(x, torch.ones(3, 4)),
                  lambda: torch.ones(()).add_(x.sum()), lambda: torch.cat([x, torch.ones(1, 4)])):  # fmt: skip
        with pytest.raises(RuntimeError, match="same device"):
            other()
    assert (x + torch.ones(())).device.type == NAME, "a number on the CPU may meet it"
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        x.data = torch.ones(3, 4)


def test_it_has_generators_of_its_own() -> None:
    with pytest.raises(RuntimeError, match="device type for generator"):
        torch.randn(2, generator=torch.Generator(), device=NAME)
    before = torch.get_rng_state()
    state = torch.emulated.get_rng_state()
    drawn = torch.randn(5, device=NAME)
    assert torch.equal(torch.get_rng_state(), before), "nothing was drawn from the CPU's"
    torch.emulated.set_rng_state(state)
    assert torch.equal(torch.randn(5, device=NAME), drawn)
    torch.manual_seed(3)
    one = nn.functional.dropout(torch.ones(50, device=NAME))
    torch.manual_seed(3)
    assert torch.equal(nn.functional.dropout(torch.ones(50, device=NAME)), one)


def layers() -> list[tuple[str, nn.Module, tuple[int, ...]]]:
    return [
        ("mlp", nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7)), (6, 5)),
        ("convolutions", nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
                                       nn.ConvTranspose2d(4, 2, 2, groups=2)), (2, 2, 8, 8)),
        ("attention", nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 5, 8)),
        *((kind.__name__, kind(3, 4, num_layers=2, bidirectional=True, batch_first=True), (2, 5, 3))
          for kind in (nn.RNN, nn.LSTM, nn.GRU)),
    ]  # fmt: skip


@pytest.mark.parametrize("index", range(6))
def test_gradients_are_the_cpus(index: int) -> None:
    _, model, shape = layers()[index]
    model = model.double()
    x = torch.randn(shape, dtype=torch.float64)

    def gradients(device: str) -> list[torch.Tensor]:
        out = model.to(device)(x.to(device))
        loss = (out[0] if isinstance(out, tuple) else out).square().sum()
        return [g.cpu() for g in torch.autograd.grad(loss, list(model.parameters()))]

    for one, other in zip(gradients("cpu"), gradients(NAME), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_sparse_gradients_complex_numbers_and_autocast() -> None:
    words = nn.Embedding(9, 4, sparse=True).to(NAME)
    words(torch.tensor([[1, 2], [3, 3]], device=NAME)).square().sum().backward()
    gradient = words.weight.grad.coalesce()
    assert gradient.is_sparse
    assert gradient.device.type == NAME
    torch.testing.assert_close(gradient.to_dense()[1], 2 * words.weight.detach()[1])

    z = torch.randn(4, dtype=torch.complex64, device=NAME, requires_grad=True)
    (torch.fft.ifft(torch.fft.fft(z) * z.conj()).abs().sum()).backward()
    assert bool(z.grad.isfinite().all())

    with torch.autocast(NAME, dtype=torch.bfloat16):
        assert nn.Linear(4, 2).to(NAME)(torch.randn(3, 4, device=NAME)).dtype is torch.bfloat16
        assert torch.ones(3, device=NAME).softmax(0).dtype is torch.float32
