"""The names of the files of a version of the ``eager`` kind, for those who look for them. Knows no torch."""

FACTORY_FILE, WEIGHTS_FILE = "factory.yaml", "weights.safetensors"
