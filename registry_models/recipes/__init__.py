"""Recipes of registered versions: where they come from, their files, and the code they need."""
