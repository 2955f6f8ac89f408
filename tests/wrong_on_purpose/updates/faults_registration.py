"""Faults of registration: the wrong tensors in the optimizer, the wrong options, ties and flags that got lost."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tests.wrong_on_purpose.updates import models
from tests.wrong_on_purpose.updates.catalogue import fault

Built = tuple[Any, ...]


def _supervised(model: nn.Module, batch: Any, loss: Any, optimizer: Any, **more: Any) -> Built:
    return model, {"batch": batch, "loss": loss, "optimizer": optimizer, **more}


def _head_replaced(wrong: bool) -> Built:
    model, batch = models.mlp()
    if not wrong:
        model.head = nn.Linear(16, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    if wrong:
        model.head = nn.Linear(16, 3)
    return _supervised(model, batch, models.classify, optimizer)


fault("optimizer built before the head was replaced", "registration", "mlp", "registration.stale", "head.weight")(
    _head_replaced
)
fault("replaced head is never trained", "registration", "mlp", "registration.coverage", "head.bias")(_head_replaced)


@fault("biases left out of the optimizer", "registration", "convnet", "registration.coverage", "norm.bias")
def _(wrong: bool) -> Built:
    model, batch = models.conv()
    chosen = [p for n, p in model.named_parameters() if not (wrong and n.endswith("bias"))]
    return _supervised(model, batch, models.classify, torch.optim.SGD(chosen, lr=0.1))


@fault("one layer forgotten in the groups", "registration", "gpt", "registration.coverage", "block.out.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    named = dict(model.named_parameters())
    decay = [p for n, p in named.items() if p.dim() > 1 and not (wrong and n == "block.out.weight")]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": [p for p in named.values() if p.dim() < 2]}]
    return _supervised(model, batch, models.next_token, torch.optim.AdamW(groups))


@fault("layer added after the optimizer", "registration", "vae", "registration.coverage", "encoder.1.weight")
def _(wrong: bool) -> Built:
    model, batch = models.vae()
    if not wrong:
        model.encoder = nn.Sequential(model.encoder, nn.Linear(6, 6))
    optimizer = torch.optim.Adam(model.parameters())
    if wrong:
        model.encoder = nn.Sequential(model.encoder, nn.Linear(6, 6))
    return _supervised(model, batch, models.evidence_bound, optimizer)


@fault("model copied after the optimizer", "registration", "gpt", "registration.stale", "embedding.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    optimizer = torch.optim.Adam(model.parameters())
    if wrong:
        model = copy.deepcopy(model)
    return _supervised(model, batch, models.next_token, optimizer)


@fault("optimizer holds the average, not the model", "registration", "mlp", "registration.coverage", "first.weight")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    average = copy.deepcopy(model)
    return _supervised(model, batch, models.classify, torch.optim.Adam((average if wrong else model).parameters()))


@fault("lists joined twice", "registration", "mlp", "registration.duplicate", "head.weight")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    chosen = list(model.parameters()) + (list(model.head.parameters()) if wrong else [])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _supervised(model, batch, models.classify, torch.optim.SGD(chosen, lr=0.1))


@fault("tied weight listed under both names", "registration", "gpt", "registration.duplicate", "embedding.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    named = model.named_parameters(remove_duplicate=not wrong)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _supervised(model, batch, models.next_token, torch.optim.AdamW([p for _, p in named]))


@fault("tied through .data", "registration", "gpt", "registration.tied", "embedding.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    if wrong:
        model.head.weight = nn.Parameter(model.embedding.weight.data)
    return _supervised(model, batch, models.next_token, torch.optim.AdamW(model.parameters()))


@fault("tie lost on loading", "registration", "gpt", "registration.tied", "embedding.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()

    def load(loaded: nn.Module) -> None:
        if wrong:
            loaded.head.weight = nn.Parameter(loaded.embedding.weight.detach().clone())

    return (*_supervised(model, batch, models.next_token, torch.optim.AdamW(model.parameters())), load)


@fault("frozen backbone that requires a gradient", "registration", "mlp", "registration.requires-grad", "first.weight")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    model.first.requires_grad_(wrong)
    optimizer = torch.optim.AdamW(model.parameters())
    return _supervised(model, batch, models.classify, optimizer, expect={"frozen": ["first.*"]})


@fault("adapter left frozen", "registration", "vae", "registration.requires-grad", "decoder.bias")
def _(wrong: bool) -> Built:
    model, batch = models.vae()
    model.decoder.bias.requires_grad_(not wrong)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    return _supervised(model, batch, models.evidence_bound, optimizer, expect={"trainable": ["decoder.*"]})


@fault("decay groups the wrong way round", "registration", "gpt", "registration.hyperparameters", "block.norm.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.0 if wrong else 0.1},
              {"params": vectors, "weight_decay": 0.1 if wrong else 0.0}]  # fmt: skip
    expect = {"weight_decay": {"*.norm.*": 0.0, "*.bias": 0.0, "*": 0.1}}
    return _supervised(model, batch, models.next_token, torch.optim.AdamW(groups), expect=expect)


@fault("half of the decay order reversed", "registration", "gpt", "registration.hyperparameters", "block.down.bias")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    named = list(model.named_parameters())
    values = [0.1 if p.dim() > 1 else 0.0 for _, p in named]
    if wrong:  # the list of values was sorted the other way for the second half of the layers
        half = len(values) // 2
        values = values[:half] + values[half:][::-1]
    groups = [{"params": [p], "weight_decay": v} for (_, p), v in zip(named, values, strict=True)]
    expect = {"weight_decay": {"*.norm.*": 0.0, "*.bias": 0.0, "*": 0.1}}
    return _supervised(model, batch, models.next_token, torch.optim.AdamW(groups), expect=expect)


for _name, _options, _mistaken in (
    ("lr", {"lr": 1e-3}, {"lr": 1e-2}),
    ("betas", {"betas": (0.9, 0.95)}, {"betas": (0.9, 0.999)}),
    ("eps", {"eps": 1e-6}, {"eps": 1e-8}),
    ("amsgrad", {"amsgrad": True}, {"amsgrad": False}),
    ("maximize", {"maximize": False}, {"maximize": True}),
):

    @fault(f"{_name} other than declared", "registration", "vae", "registration.hyperparameters", "encoder.weight")
    def _(wrong: bool, right: Any = _options, mistaken: Any = _mistaken) -> Built:
        model, batch = models.vae()
        optimizer = torch.optim.Adam(model.parameters(), **(mistaken if wrong else right))
        return _supervised(model, batch, models.evidence_bound, optimizer, expect=right)


for _name in ("momentum", "nesterov"):

    @fault(f"{_name} lost in a group", "registration", "convnet", "registration.hyperparameters", "head.weight")
    def _(wrong: bool, name: str = _name) -> Built:
        model, batch = models.conv()
        options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": True}
        optimizer = torch.optim.SGD(model.parameters(), **options)
        if wrong:
            optimizer.param_groups[0][name] = 0.5 if name == "momentum" else False
        return _supervised(model, batch, models.classify, optimizer, expect={name: options[name]})


@fault("another class than declared", "registration", "mlp", "registration.hyperparameters")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    optimizer = (torch.optim.Adam if wrong else torch.optim.AdamW)(model.parameters(), weight_decay=0.1)
    return _supervised(model, batch, models.classify, optimizer, expect={"optimizer": "AdamW"})


@fault("frozen layer moved by weight decay", "registration", "mlp", "update.frozen", "first.weight")
def _(wrong: bool) -> Built:
    """The features were to be frozen by zeroing their gradients in a hook; decay moves them all the same."""
    model, batch = models.mlp()
    if wrong:
        for parameter in model.first.parameters():
            parameter.register_hook(torch.zeros_like)
    else:
        model.first.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    return _supervised(model, batch, models.classify, optimizer, expect={"frozen": ["first.*"]})


@fault("frozen layer moved by kept momentum", "registration", "convnet", "update.frozen", "conv.weight")
def _(wrong: bool) -> Built:
    """Frozen half-way through training by zeroed gradients: the momentum buffer rolls on."""
    model, batch = models.conv()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    models.train(model, batch, models.classify, optimizer)
    if wrong:
        model.conv.weight.register_hook(torch.zeros_like)
    else:
        model.conv.weight.requires_grad_(False)
    return _supervised(model, batch, models.classify, optimizer, expect={"frozen": ["conv.weight"]})


@fault("graph cut by detach", "registration", "gpt", "step.gradient-present", "embedding.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())

    def loss(m: Any, b: Any) -> torch.Tensor:
        hidden = m.embedding(b["tokens"])
        logits = m.head(m.block(hidden.detach() if wrong else hidden))
        return nn.functional.cross_entropy(logits.flatten(0, 1), b["targets"].flatten())

    return _supervised(model, batch, loss, torch.optim.AdamW(model.parameters()))


@fault("scale read through .item()", "registration", "mlp", "step.gradient-present", "scale")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    model.scale = nn.Parameter(torch.tensor(1.5))

    def loss(m: Any, b: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(m(b["x"]) * (m.scale.item() if wrong else m.scale), b["y"])

    return _supervised(model, batch, loss, torch.optim.AdamW(model.parameters()))


@fault("gradient hook zeroes a layer", "registration", "vae", "step.gradient-present", "encoder.bias", "warn")
def _(wrong: bool) -> Built:
    model, batch = models.vae()
    if wrong:
        model.encoder.bias.register_hook(torch.zeros_like)
    return _supervised(model, batch, models.evidence_bound, torch.optim.Adam(model.parameters()))


@fault("updates lost in bfloat16", "precision", "mlp", "update.lost-to-rounding", "second.weight", "warn")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    model, batch = model.bfloat16(), {"x": batch["x"].bfloat16(), "y": batch["y"]}
    with torch.no_grad():  # biases at 0 move by any amount: only weights can lose their updates
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter).sign())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5 if wrong else 1e-1)
    return _supervised(model, batch, models.classify, optimizer)


@fault("fused SGD skips blocks in bfloat16", "precision", "mlp", "optimizer.probe")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    model, batch = model.bfloat16(), {"x": batch["x"].bfloat16(), "y": batch["y"]}
    return _supervised(model, batch, models.classify, torch.optim.SGD(model.parameters(), lr=0.1, fused=wrong))


@fault("Adam's eps is 0 in float16", "precision", "mlp", "optimizer.probe")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()
    model, batch = model.half(), {"x": batch["x"].half(), "y": batch["y"]}
    optimizer = torch.optim.Adam(model.parameters()) if wrong else torch.optim.SGD(model.parameters(), lr=0.1)
    return _supervised(model, batch, models.classify, optimizer)


@fault("running mean overwritten in a hook", "buffers", "convnet", "buffers.batch-norm")
def _(wrong: bool) -> Built:
    model, batch = models.conv()

    def forget(module: nn.Module, *_: Any) -> None:
        module.running_mean.data.mul_(0.9)  # in place, autograd would notice and the backward raise

    if wrong:
        model.norm.register_forward_hook(forget)
    return _supervised(model, batch, models.classify, torch.optim.SGD(model.parameters(), lr=0.1))


@fault("weights written in a forward hook", "registration", "mlp", "update.outside-step", "second.weight")
def _(wrong: bool) -> Built:
    model, batch = models.mlp()

    def scale(module: nn.Module, *_: Any) -> None:
        module.weight.data.mul_(0.999)

    if wrong:
        model.second.register_forward_hook(scale)
    return _supervised(model, batch, models.classify, torch.optim.SGD(model.parameters(), lr=0.1))


@fault("learning rate too high to stay finite", "precision", "gpt", "update.finite", "block.up.weight")
def _(wrong: bool) -> Built:
    model, batch = models.gpt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e20 if wrong else 0.1)

    def loss(m: Any, b: Any) -> torch.Tensor:
        return models.next_token(m, b) * (1e20 if wrong else 1.0)

    return _supervised(model, batch, loss, optimizer)


@fault("loss not finite", "step", "vae", "step.loss-finite")
def _(wrong: bool) -> Built:
    model, batch = models.vae()

    def loss(m: Any, b: Any) -> torch.Tensor:
        value = models.evidence_bound(m, b)
        return value + torch.log(value.detach() * 0 if wrong else value.detach() * 0 + 1)

    return _supervised(model, batch, loss, torch.optim.Adam(model.parameters()))


class Unregistered(nn.Module):
    """A net whose middle is kept as ``how`` says; the correct twin registers it."""

    def __init__(self, how: str, wrong: bool) -> None:
        super().__init__()
        self.how = how
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 3)
        layer, scale = nn.Linear(16, 16), torch.full((16,), 0.9)
        self.middle: Any
        if how == "buffer" and wrong:
            self.register_buffer("middle", scale.requires_grad_())
        elif how in ("buffer", "tensor"):
            self.middle = scale.requires_grad_() if wrong else nn.Parameter(scale)
        elif how == "list":
            self.middle = [layer] if wrong else nn.ModuleList([layer])
        else:
            self.middle = {"layer": layer} if wrong else nn.ModuleDict({"layer": layer})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.first(x))
        if self.how in ("buffer", "tensor"):
            return self.head(hidden * self.middle)
        return self.head(torch.tanh(self.middle[0 if self.how == "list" else "layer"](hidden)))


for _how, _named in {
    "buffer": "middle",
    "tensor": "middle",
    "list": "middle.0.weight",
    "dict": "middle.layer.weight",
}.items():

    def _unregistered(wrong: bool, how: str = _how) -> Built:
        _, batch = models.mlp()
        model = Unregistered(how, wrong)
        return _supervised(model, batch, models.classify, torch.optim.SGD(model.parameters(), lr=0.1))

    fault(f"learnable {_how} that is no parameter", "registration", "mlp", "registration.reaches-loss", _named)(
        _unregistered
    )
