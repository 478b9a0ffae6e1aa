"""Hand-written kernels, each beside a reference that says what it means."""
