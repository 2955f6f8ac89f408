"""A recipe for a version that brought none: read off its files and its own code, the rest assumed and said so.

Runs the model's code: only ever called in an audit's child.
"""

from registry_models.inference.infer import Inferred, infer_recipe

__all__ = ["Inferred", "infer_recipe"]
