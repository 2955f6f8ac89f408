"""Sequences: recurrence, attention, speech, language."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from benchmarks.models.ordinary.kinds import Made, mlp, ordinary


class PackedSeq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(29, 12, padding_idx=0)
        self.encoder = nn.GRU(12, 10, batch_first=True, bidirectional=True)
        self.bridge, self.decoder = nn.Linear(20, 12), nn.GRUCell(12, 12)
        self.attend, self.head = nn.Linear(20, 12, bias=False), nn.Linear(24, 29)

    def forward(self, source: torch.Tensor, lengths: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embed(source), lengths, batch_first=True, enforce_sorted=False)
        out, hidden = self.encoder(packed)
        memory, _ = pad_packed_sequence(out, batch_first=True)
        keys, state, steps = self.attend(memory), torch.tanh(self.bridge(hidden.transpose(0, 1).flatten(1))), []
        padded = torch.arange(memory.shape[1])[None] >= lengths[:, None]
        for i in range(target.shape[1]):
            state = self.decoder(self.embed(target[:, i]), state)
            scores = (keys @ state[:, :, None]).squeeze(-1).masked_fill(padded, float("-inf"))
            context = (scores.softmax(-1)[:, None] @ keys).squeeze(1)
            steps.append(self.head(torch.cat([state, context], -1)))
        return torch.stack(steps, 1)


@ordinary
def packed_seq2seq() -> Made:
    lengths = torch.tensor([7, 3, 5])
    source = torch.randint(1, 29, (3, 7)).masked_fill(torch.arange(7)[None] >= lengths[:, None], 0)
    batch = {"source": source, "lengths": lengths, "target": torch.randint(1, 29, (3, 6))}

    def loss(m: Any, b: Any) -> torch.Tensor:
        out = m(b["source"], b["lengths"], b["target"][:, :-1])
        return F.cross_entropy(out.flatten(0, 1), b["target"][:, 1:].flatten(), ignore_index=0)

    return PackedSeq2Seq(), batch, loss


@ordinary
def ctc_speech() -> Made:
    class Speech(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Sequential(nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.ReLU())
            self.rnn, self.head = nn.LSTM(16, 12, bidirectional=True), nn.Linear(24, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.rnn(self.front(x).permute(2, 0, 1))[0]).log_softmax(-1)

    batch = {"x": torch.randn(3, 8, 15), "y": torch.randint(1, 7, (3, 5)), "n": torch.tensor([15, 12, 10]),
             "m": torch.tensor([5, 3, 4])}  # fmt: skip
    return Speech(), batch, lambda m, b: F.ctc_loss(m(b["x"]), b["y"], b["n"], b["m"], zero_infinity=True)


@ordinary
def label_smoothing_ignored() -> Made:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
    model = nn.Sequential(nn.Embedding(23, 16), nn.TransformerEncoder(layer, 2), nn.Linear(16, 23))
    labels = torch.randint(0, 23, (3, 8))
    labels[:, 5:] = -100

    def loss(m: Any, b: Any) -> torch.Tensor:
        return F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten(), ignore_index=-100, label_smoothing=0.1)

    return model, {"x": torch.randint(0, 23, (3, 8)), "y": labels}, loss


@ordinary
def weight_norm_wavenet() -> Made:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = parametrizations.weight_norm
            self.enter = nn.Conv1d(1, 8, 1)
            self.gates = nn.ModuleList(norm(nn.Conv1d(8, 16, 2, dilation=2**i)) for i in range(3))
            self.outs = nn.ModuleList(norm(nn.Conv1d(8, 8, 1)) for _ in range(3))
            self.leave = nn.Conv1d(8, 16, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h, skips = self.enter(x), 0
            for i, (gate, out) in enumerate(zip(self.gates, self.outs, strict=True)):
                a, b = gate(F.pad(h, (2**i, 0))).chunk(2, 1)
                done = out(torch.tanh(a) * torch.sigmoid(b))
                h, skips = h + done, skips + done
            return self.leave(F.relu(skips))

    batch = {"x": torch.rand(2, 1, 12), "y": torch.randint(0, 16, (2, 12))}
    return Stack(), batch, lambda m, b: F.cross_entropy(m(b["x"]), b["y"])


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        p = self.p if self.training else 0.0
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=mask is None)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class TiedLm(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wte, self.wpe, self.drop = nn.Embedding(31, 16), nn.Embedding(12, 16), nn.Dropout(dropout)
        self.blocks, self.norm = nn.ModuleList(Block(16, 4, dropout) for _ in range(2)), nn.LayerNorm(16)
        self.head = nn.Linear(16, 31, bias=False)
        self.head.weight = self.wte.weight
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        h = self.drop(self.wte(x) + self.wpe(torch.arange(x.shape[1])))
        for block in self.blocks:
            h = block(h, mask)
        return self.head(self.norm(h))


def next_token(m: Any, b: Any) -> torch.Tensor:
    return F.cross_entropy(m(b["x"]).flatten(0, 1), b["y"].flatten())


@ordinary
def tied_nanogpt() -> Made:
    return TiedLm(), {"x": torch.randint(0, 31, (4, 12)), "y": torch.randint(0, 31, (4, 12))}, next_token


@ordinary
def tied_nanogpt_dropout_everywhere() -> Made:
    return TiedLm(0.2), {"x": torch.randint(0, 31, (4, 12)), "y": torch.randint(0, 31, (4, 12))}, next_token


@ordinary
def masked_attention_padding() -> Made:
    keep = torch.ones(3, 1, 8, 8, dtype=torch.bool).tril()
    keep[1, :, :, 5:] = False
    keep = keep | torch.eye(8, dtype=torch.bool)

    def loss(m: Any, b: Any) -> torch.Tensor:
        per = F.cross_entropy(m(b["x"], b["keep"]).transpose(1, 2), b["y"], reduction="none")
        return (per * b["weight"]).sum() / b["weight"].sum()

    weight = torch.ones(3, 8)
    weight[1, 5:] = 0
    batch = {"x": torch.randint(0, 31, (3, 8)), "y": torch.randint(0, 31, (3, 8)), "keep": keep, "weight": weight}
    return TiedLm(), batch, loss


@ordinary
def truncated_rnn_with_detach() -> Made:
    class Rnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.cell, self.head = nn.Embedding(17, 8), nn.LSTMCell(8, 12), nn.Linear(12, 17)

    def loss(m: Any, b: Any) -> torch.Tensor:
        state, total = None, torch.zeros(())
        for start in (0, 4):
            if state is not None:
                state = (state[0].detach(), state[1].detach())
            for i in range(start, start + 4):
                state = m.cell(m.embed(b["x"][:, i]), state)
                total = total + F.cross_entropy(m.head(state[0]), b["y"][:, i])
        return total / 8

    loss.declared = {"stop_gradient": ("loss",)}  # type: ignore[attr-defined]
    return Rnn(), {"x": torch.randint(0, 17, (4, 8)), "y": torch.randint(0, 17, (4, 8))}, loss


@ordinary
def embedding_bags_offsets() -> Made:
    class Ranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.item = nn.EmbeddingBag(50, 8, mode="mean"), nn.Embedding(20, 8)
            self.dense = mlp(5, 16, 8)
            self.top = mlp(8 * 3, 16, 1)

        def forward(self, words: torch.Tensor, offsets: torch.Tensor, item: torch.Tensor, x: torch.Tensor) -> Any:
            return self.top(torch.cat([self.bag(words, offsets), self.item(item), self.dense(x)], -1)).squeeze(-1)

    batch = {"words": torch.randint(0, 50, (17,)), "offsets": torch.tensor([0, 3, 3, 9, 12, 15]),
             "item": torch.randint(0, 20, (6,)), "x": torch.randn(6, 5), "y": torch.rand(6).round()}  # fmt: skip

    def loss(m: Any, b: Any) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(m(b["words"], b["offsets"], b["item"], b["x"]), b["y"])

    return Ranker(), batch, loss


@ordinary
def complex_linear_and_stft() -> Made:
    class Mask(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("window", torch.hann_window(16))
            self.body = mlp(9, 24, 9)

        def forward(self, wave: torch.Tensor) -> torch.Tensor:
            spectrum = torch.stft(wave, 16, 8, window=self.window, return_complex=True)
            mask = torch.sigmoid(self.body(spectrum.abs().transpose(1, 2))).transpose(1, 2)
            return torch.istft(spectrum * mask, 16, 8, window=self.window, length=wave.shape[-1])

    return Mask(), {"x": torch.randn(3, 64), "y": torch.randn(3, 64)}, lambda m, b: F.l1_loss(m(b["x"]), b["y"])


@ordinary
def jagged_sequences() -> Made:
    class Pool(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(19, 8), nn.Linear(8, 3)

        def forward(self, rows: list[torch.Tensor]) -> torch.Tensor:
            return self.head(torch.stack([self.embed(row).mean(0) for row in rows]))

    rows = [torch.randint(0, 19, (n,)) for n in (3, 1, 5, 2)]
    batch = {"x": rows, "y": torch.randint(0, 3, (4,))}
    return Pool(), batch, lambda m, b: F.cross_entropy(m(b["x"]), b["y"])
