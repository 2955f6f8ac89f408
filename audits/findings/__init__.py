"""From rows to findings: which of them stand, what each one means, what to do about it."""
