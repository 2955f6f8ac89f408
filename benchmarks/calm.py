"""How calm the audit is: models and optimizers that are right, and what it says about them.

    python benchmarks/calm.py --groups families,modules,optimizers,transformers --seconds 900

A subject is calm when the audit passes it plainly. Printed are alarms, inconclusives and warnings by check and by
group, and each of them with its subject; nothing here is written by those who wrote the checks but the families of
`benchmarks/models/correct.py`: `torch.testing`'s databases of modules and optimizers, and the configurations that
transformers ships with its architectures, made small, weights at random.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import signal
import sys
import time
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import audits
from audits.callables import CallableReference, as_loss
from audits.outcomes import Outcome
from benchmarks.models.correct import FAMILIES, classes

#: What makes a recipe: model, batch, loss, optimizer.
Made = tuple[nn.Module, Any, Any, torch.optim.Optimizer]
Subjects = Iterator[tuple[str, Callable[[], Made]]]

#: A subject that takes longer is left out, and counted.
SECONDS = 60

#: Architectures of transformers, by model type: causal, masked or sequence-to-sequence language models.
CAUSAL = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe",
    "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "falcon", "mpt", "stablelm", "starcoder2", "olmo",
    "olmo2", "cohere", "codegen", "ctrl", "xglm", "biogpt", "persimmon", "granite", "nemotron", "glm", "mamba",
    "mamba2", "rwkv", "recurrent_gemma", "dbrx", "jamba", "olmoe", "gpt_oss", "deepseek_v3", "granitemoe", "helium",
    "exaone4", "smollm3", "bamba", "zamba", "falcon_mamba", "nemotron_h",
)  # fmt: skip
MASKED = (
    "bert", "roberta", "albert", "distilbert", "electra", "deberta", "deberta-v2", "camembert", "xlm-roberta", "xlm",
    "mpnet", "mobilebert", "squeezebert", "funnel", "convbert", "fnet", "ibert", "roformer", "nystromformer",
    "megatron-bert", "layoutlm", "longformer", "big_bird", "rembert", "yoso", "ernie", "data2vec-text", "xmod",
    "modernbert", "mra", "luke",
)  # fmt: skip
SEQUENCE = (
    "t5", "mt5", "bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "led", "m2m_100", "longt5",
    "umt5", "prophetnet", "plbart",
)  # fmt: skip

#: What makes any configuration small; keys that one does not have are left out.
SMALL: dict[str, Any] = {
    "vocab_size": 67, "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "word_embed_proj_dim": 32,
    "emb_dim": 32, "dim": 32, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "n_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_encoder_layers": 2, "num_decoder_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "intermediate_size": 64, "ffn_dim": 64, "d_ff": 64, "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64, "hidden_dim": 64, "d_kv": 8, "head_dim": 8, "d_inner": 64, "n_inner": 64, "rotary_dim": 4,
    "moe_intermediate_size": 32, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0, "sliding_window": 16,
    "dropout": 0.1, "use_cache": False, "state_size": 8, "expand": 2, "time_step_rank": 4,
}  # fmt: skip


def _without_test_packages() -> None:
    """Let torch's databases be imported where the packages of its own tests are not installed."""
    try:
        import expecttest  # noqa: F401
    except ImportError:
        stand_in: Any = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def families() -> Subjects:
    for name, make in FAMILIES.items():

        def made(make: Any = make) -> Made:
            model, batch, loss = make()
            held = [p for p in model.parameters() if p.requires_grad]
            return model, batch, loss, torch.optim.SGD(held, lr=0.01, momentum=0.9)

        yield name, made


def modules() -> Subjects:
    """Every module of torch's own database that has a parameter and a floating result, once per input."""
    _without_test_packages()
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        if "jit" in info.name or "Lazy" in info.name:
            continue
        try:
            inputs = info.module_inputs_func(
                info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
            )  # fmt: skip
        except Exception:
            continue
        for i, given in enumerate(inputs):
            if given.forward_input is not None:
                yield f"{info.name}-{i}", lambda info=info, given=given: _wrapped(info, given)


class _Wrapped(nn.Module):
    """A module with a linear layer before it, that there be something to train, and its arguments."""

    def __init__(self, inner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.inner, self.args, self.kwargs = inner, args, kwargs
        first = args[0]
        self.scale = (
            nn.Parameter(torch.ones(first.shape[-1] if first.dim() else 1)) if first.is_floating_point() else None
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        given = x if self.scale is None else x * self.scale
        out = self.inner(given, *self.args[1:], **self.kwargs)
        out = out[0] if isinstance(out, (tuple, list)) else out
        return out.reshape(-1) if out.is_floating_point() else x.new_zeros(1)


def _mean_of_squares(model: nn.Module, batch: Any) -> torch.Tensor:
    return (model(batch["x"]) + 0.3).square().mean()


def _wrapped(info: Any, given: Any) -> Made:
    inner = info.module_cls(*given.constructor_input.args, **given.constructor_input.kwargs)
    args = given.forward_input.args
    model = _Wrapped(inner, args, given.forward_input.kwargs)
    if not any(p.requires_grad for p in model.parameters()):
        raise NotImplementedError("nothing to train")
    return model, {"x": args[0]}, _mean_of_squares, adamw(model)


def optimizers() -> Subjects:
    """Every configuration of torch's own database of optimizers, on an MLP."""
    _without_test_packages()
    from torch.testing._internal.common_optimizers import optim_db

    for info in optim_db:
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):

            def made(info: Any = info, given: Any = given) -> Made:
                model: nn.Module
                if info.optim_cls is torch.optim.SparseAdam:
                    model = nn.Sequential(nn.EmbeddingBag(23, 3, sparse=True))
                    batch = {"x": torch.randint(0, 23, (16, 5)), "y": torch.randint(0, 3, (16,))}
                else:
                    first, middle, last = nn.Linear(8, 12, False), nn.Linear(12, 12, False), nn.Linear(12, 3, False)
                    model, batch = nn.Sequential(first, nn.Tanh(), middle, nn.Tanh(), last), classes()
                kwargs = {k: v for k, v in given.kwargs.items() if k not in ("differentiable", "capturable")}
                return model, batch, "cross_entropy", info.optim_cls(list(model.parameters()), **kwargs)

            yield f"{info.optim_cls.__name__}-{i} {given.desc}", made


def transformers() -> Subjects:
    import transformers as library

    for kinds, auto, train in (
        (CAUSAL, "AutoModelForCausalLM", _padded),
        (MASKED, "AutoModelForMaskedLM", _padded),
        (SEQUENCE, "AutoModelForSeq2SeqLM", _padded),
    ):
        for kind in kinds:

            def made(kind: str = kind, auto: str = auto, train: Any = train) -> Made:
                config = library.AutoConfig.for_model(kind)
                keys = [k for k in SMALL if hasattr(config, k) and getattr(config, k) is not None]
                config = library.AutoConfig.for_model(kind, **{k: SMALL[k] for k in keys})
                model = getattr(library, auto).from_config(config)
                model.train()
                return model, train(), "model", adamw(model)

            yield kind, made


def _padded() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 67, (3, 12))
    tokens[1, 9:], tokens[2, 6:] = 0, 0
    mask = (tokens != 0).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


GROUPS: dict[str, Callable[[], Subjects]] = {
    "families": families,
    "modules": modules,
    "optimizers": optimizers,
    "transformers": transformers,
}


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _require_finite(model: nn.Module, batch: Any, loss: Any) -> None:
    """Leave out what is not healthy: a database's inputs at which the loss is NaN or infinite.

    Raises:
        ValueError: it is such.
    """
    function = as_loss(CallableReference.of(loss, role="loss"))
    value = function(copy.deepcopy(model), batch)
    if not bool(torch.isfinite(value)):
        raise ValueError("the loss is not finite")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--groups", default=",".join(GROUPS))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so long, over all groups")
    parser.add_argument("--only", default="", help="subjects whose name holds this")
    parser.add_argument("--verbose", action="store_true", help="print the rows that are no pass")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    started = time.perf_counter()
    total: collections.Counter[str] = collections.Counter()
    by_check: dict[str, collections.Counter[str]] = {}
    for group in options.groups.split(","):
        tally: collections.Counter[str] = collections.Counter()
        for name, make in GROUPS[group]():
            if options.only not in name:
                continue
            if time.perf_counter() - started > options.seconds:
                tally["not reached"] += 1
                continue
            torch.manual_seed(0)
            try:
                with limited(SECONDS):
                    model, batch, loss, optimizer = make()
                    _require_finite(model, batch, loss)
            except Exception:
                tally["not made"] += 1
                continue
            try:
                with limited(SECONDS):
                    recipe = audits.Recipe.capture(model, batch=batch, loss=loss, optimizer=optimizer)
                    report = audits.audit(model, recipe)
            except TimeoutError:
                tally["too slow"] += 1
                continue
            except Exception as error:
                tally["raised"] += 1
                print(f"  {group} {name}: {type(error).__name__}: {str(error)[:160]}", flush=True)
                continue
            tally[report.outcome.value] += 1
            found = [r for r in report.rows if r.outcome in (Outcome.FAIL, Outcome.WARN, Outcome.INCONCLUSIVE)]
            if report.outcome is Outcome.PASS:
                continue
            for check in dict.fromkeys(r.check for r in found):
                worst = min((r for r in found if r.check == check), key=lambda r: list(Outcome).index(r.outcome))
                by_check.setdefault(check, collections.Counter())[worst.outcome.value] += 1
                print(f"  {group} {name}: {report.outcome} {check} {worst.outcome} {worst.parameter} "
                      f"[{worst.cause}] {worst.message[:200]}", flush=True)  # fmt: skip
        print(f"{group}: {dict(tally)}", flush=True)
        total += tally
    judged = sum(total[o.value] for o in Outcome)
    print(f"total: {dict(total)}; of {judged} judged")
    for check, counts in sorted(by_check.items()):
        print(f"  {check}: {dict(counts)}")


if __name__ == "__main__":
    main()
