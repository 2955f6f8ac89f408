"""What an installation can lack: each part by its extra, and the sentence that names the missing one with its cure."""

from __future__ import annotations

from audits.errors import MissingPartError

#: What each extra brings, in words, and the packages that only it brings; a package stands at the first that has it.
#: ``pyproject.toml`` has the same packages with their ranges, and a test compares the two.
EXTRAS = {
    "attest": ("Attestation", ("securesystemslib",)),
    "mlflow": (
        "The registry part",
        ("mlflow", "sqlalchemy", "yaml", "packaging", "safetensors", "jinja2", "markupsafe", "matplotlib"),
    ),
    "pipeline": (
        "The pipeline",
        (
            "prefect",
            "fastapi",
            "uvicorn",
            "httpx",
            "pydantic",
            "pydantic_settings",
            "typer",
            "rich",
            "filelock",
            "duckdb",
        ),
    ),
}

#: The pipeline's commands are said to need this.
NO_PIPELINE = "The pipeline is not installed: pip install 'gradaudit[pipeline]'"


def missing_part(error: ModuleNotFoundError) -> MissingPartError | None:
    """Return the error that names the missing part and its cure; None when the module belongs to none.

    Args:
        error: what an import raised.
    """
    package = (error.name or "").partition(".")[0]
    for extra, (part, packages) in EXTRAS.items():
        if package in packages:
            text = f"{part} is not installed (there is no module {package!r}): pip install 'gradaudit[{extra}]'"
            return MissingPartError(text, name=error.name)
    return None
