"""Frameworks' own steps from a training script with nothing but the callback, through a nightly sweep to the marks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from tests.flows.test_nightly import start

pytest.importorskip("transformers", reason="the extra 'transformers' is not installed")
pytest.importorskip("lightning", reason="the extra 'lightning' is not installed")

EXPECTED = {
    "trainer-right": ("pass", ""),
    "trainer-own": ("pass", ""),
    "trainer-twice": ("fail", "step.count"),
    "lightning-right": ("pass", ""),
    "lightning-unclipped": ("fail", "step.clipping"),
}

SCRIPT = '''
import lightning, torch, transformers
from registry_models.integrations.lightning import GradauditCallback as OfLightning
from registry_models.integrations.transformers import GradauditCallback


class Own(transformers.Trainer):
    """A loss of the script's own."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(**inputs)["logits"][:, :-1].flatten(0, 1)
        targets = inputs["labels"][:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch


class Twice(transformers.TrainerCallback):
    def on_optimizer_step(self, args, state, control, **kwargs):
        kwargs["optimizer"].step()


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Unclipped(Module):
    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        pass


def train(name, cls=transformers.Trainer, callbacks=()):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                      num_attention_heads=2, max_position_embeddings=32, pad_token_id=0)
    ids = torch.randint(5, 64, (16, 8))
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    arguments = transformers.TrainingArguments(
        output_dir="out", max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", use_cpu=True)
    cls(model=transformers.LlamaForCausalLM(config), args=arguments, train_dataset=rows,
        callbacks=[GradauditCallback(name), *callbacks]).train()


def fit(name, cls):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(0, 3, (24,)))
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
                                gradient_clip_val=0.01, callbacks=[OfLightning(name, factory=cls)])
    trainer.fit(cls(), torch.utils.data.DataLoader(data, batch_size=4))


if __name__ == "__main__":
    train("trainer-right")
    train("trainer-own", Own)
    train("trainer-twice", callbacks=[Twice()])
    fit("lightning-right", Module)
    fit("lightning-unclipped", Unclipped)
'''


@pytest.mark.end_to_end
def test_a_script_with_the_callback_alone_is_audited_wholly(client: MlflowClient, tmp_path: Path) -> None:
    mlflow.set_experiment("models")
    training = tmp_path / "training"
    training.mkdir()
    (training / "train_all.py").write_text(SCRIPT)
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    trained = subprocess.run([sys.executable, "train_all.py"], cwd=training, env=environment, capture_output=True,
                             text=True, check=False)  # fmt: skip
    assert trained.returncode == 0, trained.stderr[-3000:]
    out, err = start(["nightly"], tmp_path, client).communicate(timeout=500)
    found = {name: client.get_model_version(name, "1").tags for name in EXPECTED}
    marks = {name: (tags.get("audit.outcome"), tags.get("audit.failed_checks", "")) for name, tags in found.items()}
    for name, (outcome, check) in EXPECTED.items():
        assert marks[name][0] == outcome, (marks, out + err)
        assert check in (marks[name][1] or ""), marks
        assert float(found[name]["audit.coverage"]) == 1.0, found[name]
