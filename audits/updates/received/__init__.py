"""The gradient that an optimizer received, held against the declared loss's own."""
