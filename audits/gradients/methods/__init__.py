"""How a derivative is measured: quotients, probes along directions, single elements, and their bounds."""
