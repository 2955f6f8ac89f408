"""Batches for transformers' models: inputs from the example or the configuration, labels made to fit the head.

The loss is the model's own, the output's ``.loss``, whenever the class takes labels.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from audits.live.subject import IGNORED_LABEL
from registry_models.artifacts.transformers_files import COMPONENTS_FOLDER, import_transformers
from registry_models.inference.examples import Example

#: Rows, tokens and audio samples of a made-up batch.
_ROWS, _TOKENS, _SAMPLES = 2, 8, 1600

_SEED = 20_240_603


def is_transformers(module: nn.Module) -> bool:
    """Whether the module is one of transformers' models."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def labelled_batches(model: Any, inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield batches that make the model compute its own loss, the most fitting first."""
    labels = _Labels(model, inputs)
    if "start_positions" in labels.accepted:
        length, rows = labels.length, labels.rows
        yield {
            **inputs,
            "start_positions": labels.draw(length, rows),
            "end_positions": labels.draw(length, rows),
        }
    if "labels" in labels.accepted:
        yield from labels.of_the_head()
        yield from labels.of_the_words()
        yield {**inputs, "labels": labels.draw(_vocabulary(model), labels.rows, 4)}
        yield {**inputs, "labels": labels.draw(labels.classes, labels.rows)}
    if "bool_masked_pos" in labels.accepted and "pixel_values" in inputs:
        patch = int(getattr(model.config, "patch_size", 16))
        patches = (inputs["pixel_values"].shape[-1] // patch) ** 2
        yield {**inputs, "bool_masked_pos": labels.draw(2, labels.rows, patches).bool()}
    if "return_loss" in labels.accepted:
        yield {**inputs, "return_loss": True}
    if "pixel_values" in inputs and "PreTraining" in type(model).__name__:
        yield dict(inputs)


class _Labels:
    """Labels made up for a model and its inputs."""

    def __init__(self, model: Any, inputs: Mapping[str, Any]) -> None:
        self.accepted = inspect.signature(model.forward).parameters
        self.rows: int = next(v.shape[0] for v in inputs.values() if isinstance(v, torch.Tensor))
        self.classes = int(getattr(model.config, "num_labels", 2) or 2)
        self._model, self._inputs, self._name = model, inputs, type(model).__name__
        self._ids = inputs.get("input_ids")
        self.length: int = self._ids.shape[-1] if self._ids is not None else _TOKENS
        self._generator = torch.Generator().manual_seed(_SEED)

    def draw(self, high: int, *shape: int) -> torch.Tensor:
        """Return random whole numbers below ``high``."""
        return torch.randint(0, high, shape, generator=self._generator)

    def of_the_head(self) -> Iterator[dict[str, Any]]:
        """Yield the batch that fits what the head is for, as its class says."""
        name, inputs, rows = self._name, self._inputs, self.rows
        if "MultipleChoice" in name:
            choices = {k: v.unsqueeze(1).repeat(1, 2, *[1] * (v.dim() - 1)) for k, v in inputs.items()}
            yield {**choices, "labels": self.draw(2, rows)}
        elif "TokenClassification" in name or "FrameClassification" in name:
            yield {**inputs, "labels": self.draw(self.classes, rows, self.length)}
        elif name.endswith("Classification") or "NextSentence" in name:
            some = self.classes > 1
            yield {
                **inputs,
                "labels": self.draw(self.classes, rows) if some else torch.rand(rows, generator=self._generator),
            }
        elif "SemanticSegmentation" in name and "pixel_values" in inputs:
            yield {**inputs, "labels": self.draw(self.classes, rows, *inputs["pixel_values"].shape[-2:])}
        elif "CTC" in name:
            vocabulary = int(getattr(self._model.config, "vocab_size", 8))
            yield {**inputs, "labels": 1 + self.draw(vocabulary - 1, rows, 2)}

    def of_the_words(self) -> Iterator[dict[str, Any]]:
        """Yield batches whose labels are the words themselves, padding left out of the loss."""
        ids, inputs = self._ids, self._inputs
        if ids is None:
            return
        words = ids if inputs.get("attention_mask") is None else _unpadded(ids, inputs["attention_mask"])
        for other in ("next_sentence_label", "sentence_order_label"):
            if other in self.accepted:
                yield {**inputs, "labels": words.clone(), other: self.draw(2, self.rows)}
        if "Electra" in self._name and "PreTraining" in self._name:
            yield {**inputs, "labels": self.draw(2, *ids.shape)}
        yield {**inputs, "labels": words.clone()}


def _unpadded(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Labels that leave padding out of the loss."""
    return ids.masked_fill(mask == 0, IGNORED_LABEL) if mask.shape == ids.shape else ids


def model_inputs(model: Any, example: Example | None, folder: Path) -> tuple[dict[str, Any], str]:
    """Return the model's keyword inputs and where they come from."""
    if example is not None and example.texts:
        tokenized = _tokenized(example.texts, folder, model)
        if tokenized is not None:
            return tokenized, f"{example.source}, by the version's tokenizer"
    elif example is not None and example.keywords:
        return dict(example.keywords), example.source
    elif example is not None and len(example.arguments) == 1:
        return {str(model.main_input_name): example.arguments[0]}, example.source
    return made_inputs(model), "random inputs of the model's configuration"


def made_inputs(model: Any) -> dict[str, Any]:
    """Return random inputs of the shapes that the configuration names."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(_SEED)
    main = str(getattr(model, "main_input_name", "input_ids"))
    inputs: dict[str, Any] = {}
    if main == "input_ids" or ("input_ids" in accepted and "pixel_values" in accepted):
        ids = _tokens(model, generator)
        inputs["input_ids"] = ids
        if "attention_mask" in accepted:
            inputs["attention_mask"] = torch.ones_like(ids)
        if "decoder_input_ids" in accepted and "labels" not in accepted and "start_positions" not in accepted:
            inputs["decoder_input_ids"] = ids.clone()
    if "pixel_values" in accepted:
        inputs["pixel_values"] = torch.randn(_ROWS, *_image_shape(model.config), generator=generator)
    if main == "input_values":
        bins = getattr(model.config, "num_mel_bins", None)
        shape = (_ROWS, int(model.config.max_length), int(bins)) if bins else (_ROWS, _SAMPLES)
        inputs["input_values"] = torch.randn(shape, generator=generator)
    if main == "input_features":
        frames = 2 * int(getattr(model.config, "max_source_positions", 50))
        named = (getattr(model.config, key, None) for key in ("num_mel_bins", "input_feat_per_channel"))
        bins = next((int(value) for value in named if value), 80)
        shape = (_ROWS, bins, frames) if hasattr(model.config, "num_mel_bins") else (_ROWS, frames, bins)
        inputs["input_features"] = torch.randn(shape, generator=generator)
    return inputs


def _tokens(model: Any, generator: torch.Generator) -> torch.Tensor:
    """Random tokens of two rows, none of them special but the end-of-sequence token that ends each row."""
    vocabulary = _vocabulary(model)
    config = model.config
    special = {
        value for key in vars(config) if key.endswith("_token_id") and isinstance(value := getattr(config, key), int)
    }
    usable = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    ids = usable[torch.randint(0, len(usable), (_ROWS, _TOKENS), generator=generator)]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        ids[:, -1] = end
    return ids


def _vocabulary(model: Any) -> int:
    with contextlib.suppress(NotImplementedError, AttributeError):
        table = model.get_input_embeddings()
        if isinstance(table, nn.Embedding):
            return table.num_embeddings
    config = getattr(model.config, "text_config", None) or model.config
    return int(getattr(config, "vocab_size", 2) or 2)


def _image_shape(config: Any) -> tuple[int, int, int]:
    config = getattr(config, "vision_config", None) or config
    size = getattr(config, "image_size", 32) or 32
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(getattr(config, "num_channels", 3) or 3), int(height), int(width)


def _tokenized(texts: tuple[str, ...], folder: Path, model: Any) -> dict[str, Any] | None:
    place = folder / COMPONENTS_FOLDER / "tokenizer"
    if not place.is_dir():
        return None
    try:
        tokenizer = import_transformers().AutoTokenizer.from_pretrained(str(place), local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        encoded = tokenizer(list(texts), padding=len(texts) > 1, truncation=True, return_tensors="pt")
    except Exception:  # a tokenizer that does not work is no reason not to audit the model
        return None
    accepted = inspect.signature(model.forward).parameters
    return {key: value for key, value in encoded.items() if key in accepted}
