"""A regression from history: transformers' Trainer before 4.46 averaged micro-batches instead of labels.

Run with the installed transformers, and once more with an old one before it on the path::

    pip install --no-deps --target OLD transformers==4.45.2 tokenizers==0.20.3 accelerate==1.0.1 huggingface_hub==0.26.5
    PYTHONPATH=OLD python benchmarks/trainer_regression.py

The same training, two micro-batches with unequal numbers of labels: 4.45.2 fails ``step.gradient`` ("a mean of means"),
the Trainer that divides by ``num_items_in_batch`` passes.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from audits import audit
from audits.recipe.recipe import Recipe
from audits.settings import AuditSettings
from registry_models.integrations.transformers import GradauditCallback


class _Captures(GradauditCallback):
    """Keeps the recipe instead of registering the model."""

    recipe: Recipe

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Capture."""
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.recipe = self.capture(args, kwargs["model"], optimizer, kwargs["train_dataloader"], kwargs["lr_scheduler"])


def main() -> None:
    """Train, audit the optimizer step, print outcome and first finding."""
    torch.manual_seed(0)
    rows = []
    for index in range(16):
        ids = torch.randint(5, 64, (8,))
        labels = ids.clone()
        labels[: index % 7] = -100
        rows.append({"input_ids": ids, "labels": labels})
    configuration = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(configuration)
    callback = _Captures("unregistered")
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder, max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
            learning_rate=1e-3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, max_grad_norm=0.0,
        )  # fmt: skip
        transformers.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[callback]).train()
    report = audit(model, callback.recipe, device="cpu", settings=AuditSettings(checks=("step.*", "update.*")))
    print(f"transformers {transformers.__version__}: {report.outcome}")
    for row in report.findings[:1]:
        print(f"{row.check}: {row.message}")


if __name__ == "__main__":
    main()
