"""Classifiers of pictures and of sounds in transformers, made small, weights at random."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models.subjects import Made, Subjects, adamw

_VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
        "image_size": 32, "patch_size": 8}  # fmt: skip
_FOUR = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 4}
_TWO = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}

#: What makes each model type small.
PICTURES: dict[str, dict[str, Any]] = {
    "vit": _VIT, "beit": _VIT, "dinov2": _VIT, "data2vec-vision": _VIT, "vit_msn": _VIT, "ijepa": _VIT,
    "dinov2_with_registers": _VIT, "swin": _SWIN, "swinv2": _SWIN,
    "convnext": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "convnextv2": {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "resnet": _TWO | {"layer_type": "basic"},
    "regnet": {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 32, "groups_width": 8},
    "mobilenet_v1": {"depth_multiplier": 0.1}, "mobilenet_v2": {"depth_multiplier": 0.25},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "image_size": 64},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, "image_size": 64,
                     "initializer_range": 0.2},
    "poolformer": _FOUR | {"image_size": 64},
    "segformer": _FOUR | {"num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "pvt": _FOUR | {"num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "pvt_v2": _FOUR | {"num_attention_heads": [1, 2, 2, 4], "image_size": 64},
    "focalnet": {"embed_dim": 8, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3], "image_size": 32},
    "bit": _TWO | {"num_groups": 4},
    "swiftformer": {"embed_dims": [8, 16, 24, 32], "depths": [1, 1, 1, 1]},
}  # fmt: skip

SOUNDS = ("wav2vec2", "hubert", "wavlm", "unispeech-sat", "sew", "data2vec-audio")

_SOUND = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "conv_dim": (16,) * 4, "conv_kernel": (10, 3, 3, 2), "conv_stride": (5, 2, 2, 2), "num_feat_extract_layers": 4,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_length": 3,
    "classifier_proj_size": 16, "conv_pos_kernel_size": 5, "num_conv_pos_embeddings_groups": 4,
}  # fmt: skip


def classifiers() -> Subjects:
    """Classifiers of pictures, then of sounds."""
    import transformers as library

    for kind, small in PICTURES.items():

        def seen(kind: str = kind, small: dict[str, Any] = small) -> Made:
            config = library.AutoConfig.for_model(kind, num_labels=3, **small)
            model = library.AutoModelForImageClassification.from_config(config).train()
            size = small.get("image_size", 32)
            batch = {"pixel_values": torch.randn(8, 3, size, size), "labels": torch.randint(0, 3, (8,))}
            return model, batch, "model", adamw(model)

        yield kind, seen
    for kind in SOUNDS:

        def heard(kind: str = kind) -> Made:
            known = library.AutoConfig.for_model(kind)
            small = {k: v for k, v in _SOUND.items() if hasattr(known, k)}
            config = library.AutoConfig.for_model(kind, num_labels=3, **small)
            model = library.AutoModelForAudioClassification.from_config(config).train()
            batch = {"input_values": torch.randn(3, 800), "labels": torch.randint(0, 3, (3,))}
            return model, batch, "model", adamw(model)

        yield kind, heard
