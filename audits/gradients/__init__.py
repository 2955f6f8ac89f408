"""Autograd's gradient of the loss is the derivative of the loss."""

from audits.gradients.check import check_gradients

__all__ = ["check_gradients"]
