"""Why a gradient is wrong, zero or conventional: stop-gradients, custom Functions, hooks, aliases."""
