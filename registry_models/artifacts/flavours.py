"""Which versions hold a torch model that training can change, by what they say of themselves. Nothing is loaded here.

A version is *outside the audit* where its flavours are another library's, or where it holds a module without trainable
parameters. Its MLmodel file says so, a few small files beside it where that leaves it open:

* flavours of torch (`TORCH`) are inside, whatever else is there; so is a recipe that somebody put into the version;
* transformers by its framework, Keras by its backend, ONNX by the library that wrote the graph: from torch is inside;
* a pyfunc, or a flavour that nobody here knows, is inside if its artifacts hold torch weights. What a pickle holds is
  not looked into: nothing is unpickled to choose.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from audits.errors import ArtifactError
from registry_models.recipes.recipe_names import FOLDER, RECIPE_FILE

#: Raised when a rule below changes, so that versions are looked at again.
RULES = 1

#: Flavours whose models are torch modules. ``fastai`` is MLflow 2's.
TORCH = ("pytorch", "transformers", "sentence_transformers", "diffusers", "fastai")

#: Flavours of other libraries: of MLflow 1 to 3. What is in neither list is judged as a pyfunc is.
OTHERS = frozenset({
    "autogluon", "catboost", "crate", "crewai", "dspy", "gluon", "h2o", "johnsnowlabs", "keras", "langchain",
    "lightgbm", "llama_index", "mleap", "onnx", "openai", "paddle", "pmdarima", "promptflow", "prophet", "pyspark",
    "shap", "sklearn", "spacy", "spark", "statsmodels", "tensorflow", "xgboost",
})  # fmt: skip

PYFUNC = "python_function"

#: MLmodel's metadata: MLflow's mark of a model whose files are elsewhere, and ours of what training could change.
EXTERNAL, TRAINABLE = "mlflow.model.isExternal", "audit.trainable_tensors"

#: What a version without anything to train is called where a flavour's name would stand.
NOTHING_TO_TRAIN = "nothing to train"

#: Files that hold torch weights, by their names.
_WEIGHTS = (".pt", ".pth", ".pt2", ".ckpt", ".safetensors", "pytorch_model.bin", "adapter_model.bin")

#: How torch's exporters sign an ONNX graph.
_TORCH_WRITERS = ("pytorch", "torch")

_REQUIRES_TORCH = re.compile(r"torch\s*(?:$|[=<>~!;\[@])", re.IGNORECASE)

#: What says what to do about a torch model that is in no form that can be audited.
CURE = "log the module itself with registry_models.log_model(model, name, recipe=..., factory=...)"


@dataclass(frozen=True)
class Outside:
    """Why a version is outside the audit.

    Attributes:
        flavour: the flavour's name as MLmodel has it, ``pyfunc``, ``external`` or `NOTHING_TO_TRAIN`.
        why: a sentence without its full stop.
    """

    flavour: str
    why: str


class OutsideError(ArtifactError):
    """A version that is outside the audit: it is neither judged nor marked.

    Attributes:
        outside: why.
    """

    def __init__(self, label: str, outside: Outside) -> None:
        super().__init__(f"{label} is outside the audit: {outside.why}")
        self.outside = outside


@dataclass(frozen=True)
class Look:
    """What is known of a version's files.

    Attributes:
        described: what MLmodel says.
        files: names below the model's folder, as far as they were listed.
        read: returns the beginning of a file; None where it cannot be had without fetching weights.
    """

    described: Mapping[str, Any]
    files: Collection[str]
    read: Callable[[str], bytes | None]


def outside(look: Look) -> Outside | None:
    """Return why a version is outside the audit; None where it is to be audited, or where nothing tells."""
    flavours, metadata = _mapping(look.described.get("flavors")), _mapping(look.described.get("metadata"))
    if f"extra_files/{FOLDER}/{RECIPE_FILE}" in look.files:
        return None
    if str(metadata.get(EXTERNAL)).lower() == "true":
        return Outside("external", "an external model: MLflow has its name and metrics, its files are elsewhere")
    if not flavours:
        return None  # a damaged file, which the audit says better
    if str(metadata.get(TRAINABLE)) == "0":
        return nothing_to_train("was logged with")
    found = [name for name in flavours if name != PYFUNC]
    if any(_of_torch(name, _mapping(flavours[name]), look) for name in found) or _pyfunc_of_torch(flavours):
        return None
    known = sorted(name for name in found if name in OTHERS or name in TORCH)
    if not known and holds_torch(look):
        return None
    name = (known or sorted(found) or ["pyfunc"])[0]
    return Outside(name, _why(name, _mapping(flavours.get(name)), look))


def surely_torch(described: Mapping[str, Any]) -> bool:
    """Whether the flavours alone say that a version is to be audited, so that no further file needs a look."""
    flavours, metadata = _mapping(described.get("flavors")), _mapping(described.get("metadata"))
    named = any(_of_torch(name, _mapping(flavours[name]), None) for name in flavours)
    return named and str(metadata.get(TRAINABLE)) != "0" and str(metadata.get(EXTERNAL)).lower() != "true"


def nothing_to_train(holds: str = "holds") -> Outside:
    """Return what is said of a module that no training would change."""
    return Outside(
        NOTHING_TO_TRAIN,
        f"nothing of it is trained: its module {holds} no trainable parameter (none at all, or requires_grad=False); "
        "if it was frozen to be logged, log it as it is trained, with its recipe",
    )


def torch_files(files: Collection[str]) -> list[str]:
    """Return the files that hold torch weights, by their names."""
    return sorted(name for name in files if name.endswith(_WEIGHTS))


def holds_torch(look: Look) -> bool:
    """Whether a pyfunc's artifacts hold torch weights, or a whole MLflow model of torch's."""
    nested = [name for name in look.files if name.endswith("/MLmodel")]
    if torch_files(look.files):
        return True
    texts = [(look.read(name) or b"").decode("utf-8", "replace") for name in nested[:20]]
    return any(line.strip() in {f"{name}:" for name in TORCH} for text in texts for line in text.splitlines())


def unsupported(described: Mapping[str, Any], files: Collection[str]) -> str:
    """Return why a version that is inside the audit cannot be audited in the form it has, with the cure."""
    flavours = _mapping(described.get("flavors"))
    weights = torch_files(files)
    if "onnx" in flavours:
        return f"an ONNX graph has no module, no backward functions and no optimizer: {CURE}"
    if "keras" in flavours:
        return f"a Keras model on the torch backend is stored without its torch module: {CURE}"
    if named := [name for name in TORCH if name in flavours]:
        return f"models of the flavour {named[0]} cannot be loaded as one module here: {CURE}"
    if weights:
        return f"a pyfunc that keeps torch weights ({', '.join(weights[:3])}) names no module: {CURE}"
    return f"its flavours ({', '.join(flavours) or 'none'}) name no torch module: {CURE}"


def onnx_writer(beginning: bytes) -> str:
    """Return the library that wrote an ONNX graph; empty where the file does not say so at its beginning.

    A ModelProto begins with field 1, the version as a varint, and field 2, the producer's name, each behind a tag of
    ``field * 8 + wire type`` (https://protobuf.dev/programming-guides/encoding/).
    """
    at = 0
    while at < len(beginning):
        tag, at = _varint(beginning, at)
        field, wire = tag >> 3, tag & 7
        if wire == 0:
            _, at = _varint(beginning, at)
        elif wire == 2 and field < 7:  # 7 is the graph itself
            size, at = _varint(beginning, at)
            if field == 2:
                return beginning[at : at + size].decode("utf-8", "replace")
            at += size
        else:
            return ""
    return ""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    while at < len(data):
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if not data[at - 1] & 0x80:
            break
    return value, at


def _of_torch(name: str, options: Mapping[str, Any], look: Look | None) -> bool:
    """Whether a flavour holds a torch model; an ONNX graph that cannot be read without its weights is left to an audit.

    Args:
        name: the flavour.
        options: what MLmodel says of it.
        look: the files; without it, what can be told without them.
    """
    if name == "transformers":
        return _framework(options) == "pt"
    if name == "keras":
        return options.get("keras_backend") == "torch"
    if name == "onnx":
        beginning = look.read(_graph(options)) if look is not None else b""
        return beginning is None or onnx_writer(beginning).lower().startswith(_TORCH_WRITERS)
    return name in TORCH


def _framework(options: Mapping[str, Any]) -> str:
    """``pt``, ``tf`` or ``flax``, as MLmodel of a transformers pipeline has it, or its model's class."""
    kind = str(options.get("pipeline_model_type") or "")
    named = "tf" if kind.startswith("TF") else "flax" if kind.startswith("Flax") else "pt"
    return str(options.get("framework") or named)


def _graph(options: Mapping[str, Any]) -> str:
    return str(options.get("data") or "model.onnx")


def _pyfunc_of_torch(flavours: Mapping[str, Any]) -> bool:
    """Whether a pyfunc is loaded by the flavour of a torch library, though that flavour is not named."""
    loader = str(_mapping(flavours.get(PYFUNC)).get("loader_module") or "")
    return len(flavours) == 1 and loader in {f"mlflow.{name}" for name in TORCH}


def _why(name: str, options: Mapping[str, Any], look: Look) -> str:
    """A model of one flavour in words, from what MLmodel says beside the flavour's name."""
    if name == "onnx":
        writer = onnx_writer(look.read(_graph(options)) or b"")
        return f"an ONNX graph{f', written by {writer}' if writer else ''}, holds no module that could be trained"
    if name == "transformers":
        return f"its transformers model is {'TensorFlow' if _framework(options) == 'tf' else 'Flax'}'s, not torch's"
    if name == "keras":
        return f"a Keras model{f' on {b}' if (b := options.get('keras_backend')) else ''}, not on torch"
    what = "a pyfunc" if name == "pyfunc" else f"a model of the flavour {name}, which is not torch's"
    if name not in OTHERS and _requires_torch(look):
        return f"{what}; it requires torch, and what its pickle holds is not looked into: for an audit {CURE}"
    return what


def _requires_torch(look: Look) -> bool:
    lines = (look.read("requirements.txt") or b"").decode("utf-8", "replace").splitlines()
    return any(_REQUIRES_TORCH.match(line) for line in lines)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
