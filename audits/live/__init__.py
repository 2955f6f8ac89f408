"""A recipe made live on a model: the subject of an audit, its devices, and its state put back afterwards."""
