"""What one training step of a model is, as plain data: captured from live objects, stored, made live again."""
