"""Language models of transformers, made small, weights at random, on a padded batch."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models.subjects import Made, Subjects, adamw

#: Architectures of transformers, by model type: causal, masked or sequence-to-sequence language models.
CAUSAL = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "llama", "mistral", "mixtral", "qwen2", "qwen2_moe",
    "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "falcon", "mpt", "stablelm", "starcoder2", "olmo",
    "olmo2", "cohere", "codegen", "ctrl", "xglm", "biogpt", "persimmon", "granite", "glm", "mamba",
    "mamba2", "rwkv", "recurrent_gemma", "jamba", "olmoe", "gpt_oss", "granitemoe", "helium",
    "exaone4", "smollm3", "bamba", "falcon_mamba", "nemotron_h",
)  # fmt: skip
MASKED = (
    "bert", "roberta", "albert", "distilbert", "electra", "deberta", "deberta-v2", "camembert", "xlm-roberta", "xlm",
    "mpnet", "mobilebert", "squeezebert", "funnel", "convbert", "fnet", "ibert", "roformer", "nystromformer",
    "megatron-bert", "layoutlm", "longformer", "big_bird", "rembert", "yoso", "ernie", "data2vec-text",
    "modernbert", "mra", "luke",
)  # fmt: skip
SEQUENCE = (
    "t5", "mt5", "bart", "mbart", "marian", "pegasus", "blenderbot", "blenderbot-small", "led", "m2m_100", "longt5",
    "umt5", "prophetnet", "plbart",
)  # fmt: skip

#: What single configurations need on top, or (None) must not be given.
SPECIAL: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "falcon": {"head_dim": None},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "funnel": {"num_hidden_layers": None, "block_sizes": [1, 1]}, "prophetnet": {"num_hidden_layers": None},
    "luke": {"entity_vocab_size": 11, "entity_emb_size": 16},
}  # fmt: skip

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


def transformers() -> Subjects:
    import transformers as library

    for kinds, auto, train in (
        (CAUSAL, "AutoModelForCausalLM", _padded),
        (MASKED, "AutoModelForMaskedLM", _padded),
        (SEQUENCE, "AutoModelForSeq2SeqLM", _padded),
    ):
        for kind in kinds:

            def made(kind: str = kind, auto: str = auto, train: Any = train) -> Made:
                model = getattr(library, auto).from_config(_small(kind))
                model.train()
                return model, train(), "model", adamw(model)

            yield kind, made


def _padded() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 67, (3, 12))
    tokens[1, 9:], tokens[2, 6:] = 0, 0
    mask = (tokens != 0).long()
    return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}


def _small(kind: str) -> Any:
    """Return a small configuration of a model type."""
    import transformers as library

    config = library.AutoConfig.for_model(kind)
    wanted = {k: v for k, v in SMALL.items() if getattr(config, k, None) is not None} | SPECIAL.get(kind, {})
    config = library.AutoConfig.for_model(kind, **{k: v for k, v in wanted.items() if v is not None})
    if kind in SEQUENCE and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = 0
    return config
