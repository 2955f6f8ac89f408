"""Whether it was the rule: every recorded step of an optimizer against its reference rule."""
