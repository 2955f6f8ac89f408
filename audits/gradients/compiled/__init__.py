"""Gradients of code that torch.compile made."""
