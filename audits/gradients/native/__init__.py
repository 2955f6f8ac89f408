"""The operations that really train the model, in its own dtype."""
