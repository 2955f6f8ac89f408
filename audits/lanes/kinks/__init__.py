"""The branches operators take on floating values, and the rules that keep each one on its branch."""
