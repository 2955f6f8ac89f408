"""Pictures: generators, diffusion, classification, segmentation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from benchmarks.models.ordinary.kinds import Made, Named, images, mlp, ordinary


@ordinary
def conv_vae() -> Made:
    model = Named(
        encoder=nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        mean=nn.Linear(64, 4), log_variance=nn.Linear(64, 4),
        decoder=nn.Sequential(
            nn.Linear(4, 64), nn.ReLU(), nn.Unflatten(1, (16, 2, 2)), nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Sigmoid(),
        ),
    )  # fmt: skip

    def loss(m: Any, b: Any) -> torch.Tensor:
        h = m.encoder(b["x"])
        mean, log_variance = m.mean(h), m.log_variance(h)
        z = mean + torch.randn_like(mean) * torch.exp(0.5 * log_variance)
        rebuilt = F.binary_cross_entropy(m.decoder(z), b["x"], reduction="sum")
        return (rebuilt - 0.5 * (1 + log_variance - mean.pow(2) - log_variance.exp()).sum()) / len(b["x"])

    return model, {"x": torch.rand(6, 1, 8, 8)}, loss


@ordinary
def gan_generator() -> Made:
    judge = nn.Sequential(
        nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(64, 1),
    ).requires_grad_(False)  # fmt: skip
    maker = nn.Sequential(
        nn.Linear(6, 64), nn.Unflatten(1, (16, 2, 2)), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, 2, 1), nn.Tanh(),
    )  # fmt: skip

    def loss(m: Any, b: Any) -> torch.Tensor:
        said = m.judge(m.maker(b["z"]))
        return F.binary_cross_entropy_with_logits(said, torch.ones_like(said))

    return Named(maker=maker, judge=judge), {"z": torch.randn(8, 6)}, loss


@ordinary
def gan_discriminator_hinge() -> Made:
    norm = parametrizations.spectral_norm
    judge = nn.Sequential(norm(nn.Linear(8, 32)), nn.LeakyReLU(0.2), norm(nn.Linear(32, 1)))
    maker = mlp(4, 16, 8).requires_grad_(False)

    def loss(m: Any, b: Any) -> torch.Tensor:
        fake = m.maker(torch.randn(len(b["x"]), 4)).detach()
        return F.relu(1 - m.judge(b["x"])).mean() + F.relu(1 + m.judge(fake)).mean()

    return Named(maker=maker, judge=judge), {"x": torch.randn(16, 8)}, loss


class ResBlock(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(4, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, 1, 1))
        self.time = nn.Linear(width, channels)
        self.last = nn.Sequential(
            nn.GroupNorm(4, channels), nn.SiLU(), nn.Dropout(0.1), nn.Conv2d(channels, channels, 3, 1, 1)
        )
        nn.init.zeros_(self.last[-1].weight)
        nn.init.zeros_(self.last[-1].bias)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return x + self.last(self.first(x) + self.time(t)[:, :, None, None])


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.enter, self.down = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.high, self.low = ResBlock(8, 16), ResBlock(16, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up, self.merge = nn.Conv2d(16, 8, 3, 1, 1), ResBlock(16, 16)
        self.leave = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv2d(16, 1, 3, 1, 1))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        frequencies = torch.exp(-math.log(1e4) * torch.arange(8) / 8)
        angles = t[:, None].float() * frequencies
        t = self.time(torch.cat([angles.sin(), angles.cos()], -1))
        high = self.high(self.enter(x), t)
        low = self.low(self.down(high), t)
        flat = low.flatten(2).transpose(1, 2)
        low = low + self.attention(flat, flat, flat, need_weights=False)[0].transpose(1, 2).view_as(low)
        up = self.up(F.interpolate(low, scale_factor=2, mode="nearest"))
        return self.leave(self.merge(torch.cat([up, high], 1), t))


@ordinary
def diffusion_unet() -> Made:
    kept = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 100), 0)

    def loss(m: Any, b: Any) -> torch.Tensor:
        t = torch.randint(0, 100, (len(b["x"]),))
        noise, share = torch.randn_like(b["x"]), kept[t][:, None, None, None]
        return F.mse_loss(m(share.sqrt() * b["x"] + (1 - share).sqrt() * noise, t), noise)

    return UNet(), {"x": torch.randn(4, 1, 8, 8)}, loss


@ordinary
def instance_norm_style() -> Made:
    model = nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Conv2d(8, 8, 3, 2, 1), nn.InstanceNorm2d(8, affine=True), nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False), nn.Conv2d(8, 3, 3, padding=1), nn.Tanh(),
    )  # fmt: skip

    def loss(m: Any, b: Any) -> torch.Tensor:
        out = m(b["x"])
        smooth = (out[..., 1:] - out[..., :-1]).abs().mean() + (out[..., 1:, :] - out[..., :-1, :]).abs().mean()
        return F.l1_loss(out, b["x"]) + 0.1 * smooth

    return model, {"x": torch.rand(2, 3, 8, 8)}, loss


@ordinary
def small_batch_resnet() -> Made:
    class Block(nn.Module):
        def __init__(self, a: int, b: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True),
                nn.Conv2d(b, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b),
            )  # fmt: skip
            self.skip = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.body(x) + self.skip(x))

    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Block(8, 16, 2),
        Block(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 3),
    )  # fmt: skip
    return model, images(n=4), "cross_entropy"


@ordinary
def depthwise_squeeze_excite() -> Made:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * F.hardsigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))

    model = nn.Sequential(
        nn.Conv2d(3, 16, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(),
        nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish(), Squeeze(),
        nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(8, 3),
    )  # fmt: skip
    return model, images(n=6), "cross_entropy"


@ordinary
def maxpool_with_ties() -> Made:
    batch = images(n=4, channels=1)
    batch["x"] = (batch["x"] > 0.6).float()
    model = nn.Sequential(
        nn.MaxPool2d(2), nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 3)
    )
    return model, batch, "cross_entropy"


@ordinary
def focal_and_dice_segmentation() -> Made:
    model = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))

    def loss(m: Any, b: Any) -> torch.Tensor:
        out = m(b["x"])
        plain = F.binary_cross_entropy_with_logits(out, b["y"], reduction="none")
        p = torch.sigmoid(out)
        focal = ((1 - torch.where(b["y"] > 0, p, 1 - p)) ** 2 * plain).mean()
        return focal + 1 - (2 * (p * b["y"]).sum() + 1) / (p.sum() + b["y"].sum() + 1)

    return model, {"x": torch.rand(2, 1, 8, 8), "y": (torch.rand(2, 1, 8, 8) > 0.5).float()}, loss


@ordinary
def vision_transformer() -> Made:
    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.zeros(1, 1, 16))
            self.place = nn.Parameter(torch.randn(1, 5, 16) * 0.02)
            layer = nn.TransformerEncoderLayer(16, 4, 32, 0.1, "gelu", batch_first=True, norm_first=True)
            self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.patch(x).flatten(2).transpose(1, 2)
            h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.place
            return self.head(self.norm(self.body(h))[:, 0])

    return Vit(), images(), "cross_entropy"


@ordinary
def vector_quantised() -> Made:
    class Vq(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder, self.codes = mlp(8, 16, 4), mlp(4, 16, 8), nn.Embedding(12, 4)

    def loss(m: Any, b: Any) -> torch.Tensor:
        z = m.encoder(b["x"])
        near = m.codes(torch.cdist(z, m.codes.weight).argmin(-1))
        out = m.decoder(z + (near - z).detach())
        return F.mse_loss(out, b["x"]) + F.mse_loss(near, z.detach()) + 0.25 * F.mse_loss(z, near.detach())

    loss.declared = {"stop_gradient": ("loss",)}  # type: ignore[attr-defined]
    return Vq(), {"x": torch.randn(16, 8)}, loss


@ordinary
def deformable_sampling() -> Made:
    class Sampler(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.locate = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 6))
            nn.init.zeros_(self.locate[-1].weight)
            self.locate[-1].bias.data.copy_(torch.tensor([1.0, 0, 0, 0, 1, 0]))
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            grid = F.affine_grid(self.locate(x).view(-1, 2, 3), list(x.shape), align_corners=False)
            return self.head(F.grid_sample(x, grid, align_corners=False))

    return Sampler(), images(channels=1), "cross_entropy"


@ordinary
def group_norm_batch_of_one() -> Made:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(8, 8),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return model, images(n=1), "cross_entropy"
