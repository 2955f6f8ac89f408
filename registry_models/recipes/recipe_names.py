"""The names of a recipe's files and folders, for those who look for them and read none. Knows no torch."""

from __future__ import annotations

#: The folder's name, beside a model's other extra files.
FOLDER = "audit"
CODE_FOLDER = "code"
RECIPE_FILE, BATCH_FILE, STATE_FILE = "recipe.yaml", "batch.safetensors", "optimizer.safetensors"
