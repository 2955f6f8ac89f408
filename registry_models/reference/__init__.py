"""The reference model: a known verdict that a healthy machine must give."""
