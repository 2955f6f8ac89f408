"""Which flavours are outside the audit, by MLmodel and the names of the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from registry_models.artifacts.flavours import (
    NOTHING_TO_TRAIN,
    OTHERS,
    TORCH,
    Look,
    onnx_writer,
    outside,
    surely_torch,
    unsupported,
)

PYFUNC = {"python_function": {"loader_module": "mlflow.pyfunc.model"}}


def graph(producer: str) -> bytes:
    """An ONNX file's beginning: ir_version, producer_name, and the graph itself."""
    name = producer.encode()
    return b"\x08\x0a" + (b"\x12" + bytes([len(name)]) + name if name else b"") + b"\x3a\x03\x0a\x01g"


def look(flavours: Mapping[str, Any], files: Mapping[str, bytes | None] | None = None, **metadata: Any) -> Look:
    files = files or {}
    return Look({"flavors": flavours, "metadata": metadata}, files, lambda name: files.get(name, b""))


@pytest.mark.parametrize("flavour", sorted(OTHERS - {"onnx", "keras"}))
def test_another_librarys_flavour_is_outside(flavour: str) -> None:
    found = outside(look({flavour: {}, **PYFUNC}, {"model.pkl": b""}))
    assert found is not None
    assert found.flavour == flavour
    assert found.why == f"a model of the flavour {flavour}, which is not torch's"


@pytest.mark.parametrize("flavour", TORCH)
def test_a_flavour_of_torch_is_inside_beside_any_other(flavour: str) -> None:
    for flavours in ({flavour: {}}, {flavour: {}, **PYFUNC}, {"sklearn": {}, flavour: {}}):
        assert outside(look(flavours)) is None
        assert surely_torch({"flavors": flavours})


INSIDE: dict[str, Look] = {
    "onnx from torch": look({"onnx": {"data": "model.onnx"}}, {"model.onnx": graph("pytorch")}),
    "onnx too large to fetch": look({"onnx": {"data": "model.onnx"}}, {"model.onnx": None}),
    "keras on torch": look({"keras": {"keras_backend": "torch"}}),
    "pyfunc with torch weights": look(PYFUNC, {"artifacts/net.pt": b""}),
    "pyfunc with safetensors": look(PYFUNC, {"artifacts/m/model.safetensors": b""}),
    "pyfunc around a logged torch model": look(PYFUNC, {"artifacts/m/MLmodel": b"flavors:\n  pytorch:\n    data: x\n"}),
    "pyfunc loaded by mlflow.pytorch": look({"python_function": {"loader_module": "mlflow.pytorch"}}),
    "a flavour nobody knows, with torch weights": look({"ours": {}}, {"net.ckpt": b""}),
    "a recipe somebody shipped": look({"sklearn": {}}, {"extra_files/audit/recipe.yaml": b""}),
    "no flavours at all": look({}),
    "flavours that are no mapping": Look({"flavors": ["sklearn"]}, (), lambda _: None),
}

OUTSIDE: dict[str, tuple[Look, str, str]] = {
    "onnx from scikit-learn": (
        look({"onnx": {"data": "model.onnx"}}, {"model.onnx": graph("skl2onnx")}), "onnx", "written by skl2onnx",
    ),
    "onnx that names nobody": (look({"onnx": {}}, {"model.onnx": graph("")}), "onnx", "an ONNX graph, holds no module"),
    "keras on jax": (look({"keras": {"keras_backend": "jax"}}), "keras", "on jax, not on torch"),
    "transformers of tensorflow": (look({"transformers": {"framework": "tf"}}), "transformers", "TensorFlow's"),
    "transformers of flax": (
        look({"transformers": {"pipeline_model_type": "FlaxBertModel"}}), "transformers", "Flax's, not torch's",
    ),
    "pyfunc": (look(PYFUNC, {"python_model.pkl": b""}), "pyfunc", "a pyfunc"),
    "pyfunc that requires torch": (
        look(PYFUNC, {"requirements.txt": b"mlflow==3\ntorch==2.9\n"}), "pyfunc", "not looked into: for an audit log",
    ),
    "pyfunc that requires torchmetrics": (look(PYFUNC, {"requirements.txt": b"torchmetrics\n"}), "pyfunc", "a pyfunc"),
    "pyfunc around a logged scikit-learn model": (
        look(PYFUNC, {"artifacts/m/MLmodel": b"flavors:\n  sklearn:\n    x: 1\n"}), "pyfunc", "a pyfunc",
    ),
    "a flavour nobody knows": (look({"ours": {}, **PYFUNC}), "ours", "a model of the flavour ours"),
    "an external model": (
        look({}, **{"mlflow.model.isExternal": True}), "external", "its files are elsewhere",
    ),
    "torch with nothing to train": (
        look({"pytorch": {}}, **{"audit.trainable_tensors": 0}), NOTHING_TO_TRAIN, "no trainable parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", INSIDE)
def test_inside(case: str) -> None:
    assert outside(INSIDE[case]) is None


@pytest.mark.parametrize("case", OUTSIDE)
def test_outside(case: str) -> None:
    given, flavour, words = OUTSIDE[case]
    found = outside(given)
    assert found is not None
    assert (found.flavour, words in found.why) == (flavour, True), found.why
    assert not surely_torch(given.described)


def test_a_trainable_tensor_is_enough() -> None:
    assert outside(look({"pytorch": {}}, **{"audit.trainable_tensors": 1})) is None


@pytest.mark.parametrize("data", [b"", b"\x12", b"\x12\xff\xff\xff", b"\xff" * 40, b"\x12\x05\xff\xfe", b"PK\x03\x04"])
def test_a_damaged_graph_names_no_writer(data: bytes) -> None:
    assert not onnx_writer(data).startswith("pytorch")
    assert onnx_writer(graph("pytorch")[:4]) != "pytorch", "cut off"


@pytest.mark.parametrize(
    ("flavours", "files", "words"),
    [
        ({"onnx": {}}, [], "an ONNX graph has no module, no backward functions and no optimizer: log the module"),
        ({"keras": {}}, [], "a Keras model on the torch backend"),
        ({"diffusers": {}, **PYFUNC}, ["unet/model.safetensors"], "models of the flavour diffusers cannot be loaded"),
        (PYFUNC, ["artifacts/net.pt"], r"keeps torch weights (artifacts/net.pt) names no module"),
        ({"ours": {}}, [], "its flavours (ours) name no torch module"),
    ],
)
def test_what_is_inside_and_cannot_be_audited_has_its_own_cure(
    flavours: Mapping[str, Any], files: list[str], words: str
) -> None:
    said = unsupported({"flavors": flavours}, files)
    assert words in said
    assert "registry_models.log_model(model, name, recipe=..., factory=...)" in said
