"""Tiny transformers architectures with random weights and their dropout on, as a user would register them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

TEXT = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**TEXT, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
ENCODER = {**DECODER, "max_position_embeddings": 32}
GROUPED = {**ENCODER, "num_key_value_heads": 1, "attention_dropout": 0.1}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**VISION, "image_size": 16, "patch_size": 4, "num_labels": 3, "hidden_dropout_prob": 0.1}
SPEECH = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}

#: model class -> configuration class, its options, and MLflow's task (None: logged by mlflow.pytorch).
ZOO: Mapping[str, tuple[str, dict[str, Any], str | None]] = {
    "GPT2LMHeadModel": (
        "GPT2Config",
        {**TEXT, "n_positions": 32, "n_embd": 16, "n_layer": 2, "n_head": 2},
        "text-generation",
    ),
    "GPTNeoForCausalLM": (
        "GPTNeoConfig",
        {
            **TEXT,
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "embed_dropout": 0.1,
            "resid_dropout": 0.1,
        },
        "text-generation",
    ),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", {**ENCODER, "hidden_dropout": 0.1}, "text-generation"),
    "OPTForCausalLM": (
        "OPTConfig",
        {**TEXT, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        | {"max_position_embeddings": 32, "word_embed_proj_dim": 16},
        "text-generation",
    ),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED, "text-generation"),
    "MistralForCausalLM": ("MistralConfig", GROUPED, "text-generation"),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED, "text-generation"),
    "GemmaForCausalLM": ("GemmaConfig", {**GROUPED, "head_dim": 8}, "text-generation"),
    "PhiForCausalLM": ("PhiConfig", {**ENCODER, "resid_pdrop": 0.1}, "text-generation"),
    "BloomForCausalLM": (
        "BloomConfig",
        {**TEXT, "hidden_size": 16, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
        "text-generation",
    ),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 2}, None),
    "BertForMaskedLM": ("BertConfig", ENCODER, "fill-mask"),
    "BertForPreTraining": ("BertConfig", ENCODER, None),
    "BertForNextSentencePrediction": ("BertConfig", ENCODER, None),
    "RobertaForTokenClassification": ("RobertaConfig", {**ENCODER, "num_labels": 5}, "token-classification"),
    "DistilBertForQuestionAnswering": (
        "DistilBertConfig",
        {"vocab_size": 64, "pad_token_id": 0, "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2}
        | {"max_position_embeddings": 32},
        None,
    ),
    "AlbertForMultipleChoice": (
        "AlbertConfig",
        {**ENCODER, "embedding_size": 8, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
        None,
    ),
    "ElectraForPreTraining": ("ElectraConfig", {**ENCODER, "embedding_size": 8}, None),
    "DebertaV2ForSequenceClassification": (
        "DebertaV2Config",
        {**ENCODER, "num_labels": 3, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "text-classification",
    ),
    "MPNetForSequenceClassification": ("MPNetConfig", {**ENCODER, "num_labels": 2}, "text-classification"),
    "XLNetLMHeadModel": (
        "XLNetConfig",
        {**TEXT, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32, "dropout": 0.1},
        None,
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "d_model": 16}
        | {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2},
        None,
    ),
    "BartForConditionalGeneration": (
        "BartConfig",
        {**TEXT, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
        | {"max_position_embeddings": 32, "decoder_start_token_id": 2, "forced_eos_token_id": 2},
        None,
    ),
    "ViTForImageClassification": ("ViTConfig", VISION, None),
    "DeiTForImageClassification": ("DeiTConfig", VISION, None),
    "SwinForImageClassification": (
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
        | {"window_size": 4, "hidden_dropout_prob": 0.1, "num_labels": 3},
        None,
    ),
    "ConvNextForImageClassification": (
        "ConvNextConfig",
        {"image_size": 32, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": 3},
        None,
    ),
    "Wav2Vec2ForSequenceClassification": (
        "Wav2Vec2Config",
        {**SPEECH, "conv_dim": [8, 8], "conv_stride": [5, 4], "conv_kernel": [10, 8], "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "num_labels": 3, "mask_time_prob": 0.0}
        | {"layerdrop": 0.0, "classifier_proj_size": 8},
        "audio-classification",
    ),
    "WhisperForConditionalGeneration": (
        "WhisperConfig",
        {**TEXT, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8}
        | {"max_source_positions": 16, "max_target_positions": 16, "decoder_start_token_id": 1, "dropout": 0.1}
        | {"suppress_tokens": None, "begin_suppress_tokens": None},
        None,
    ),
    "CLIPModel": (
        "CLIPConfig",
        {
            "text_config": {**ENCODER, "attention_dropout": 0.1},
            "vision_config": {k: v for k, v in VISION.items() if k not in ("num_labels", "hidden_dropout_prob")},
            "projection_dim": 8,
        },
        None,
    ),
}


def build(name: str) -> Any:
    """Return a model of the zoo in train mode."""
    import torch
    import transformers

    config_name, options, _ = ZOO[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(transformers, name)(getattr(transformers, config_name)(**options)).train()


def tokenizer() -> Any:
    """Return a tokenizer of whole words, made here."""
    import tokenizers
    import transformers

    words = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, "[UNK]": 3, "[MASK]": 4} | {f"w{i}": i for i in range(5, 64)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, mask_token="[MASK]", model_max_length=32, **special
    )


def _components(task: str) -> dict[str, Any]:
    import transformers

    if task == "audio-classification":
        return {"feature_extractor": transformers.Wav2Vec2FeatureExtractor()}
    return {"tokenizer": tokenizer()}


def register(name: str, registered: str) -> None:
    """Register a model of the zoo by MLflow's own calls, with nothing of gradaudit's."""
    import mlflow

    model, task = build(name), ZOO[name][2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if task is None:
            mlflow.pytorch.log_model(
                model,
                name="model",
                registered_model_name=registered,
                serialization_format="pickle",
                pip_requirements=["torch"],
            )
        else:
            mlflow.transformers.log_model(
                {"model": model, **_components(task)},
                name="model",
                task=task,
                registered_model_name=registered,
                pip_requirements=["torch"],
            )
