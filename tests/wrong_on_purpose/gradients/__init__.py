"""Models whose gradients are wrong on purpose, and the right ones beside them."""
