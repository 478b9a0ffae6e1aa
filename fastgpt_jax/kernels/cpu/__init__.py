"""Kernels for CPUs, in C++ behind JAX's foreign function interface."""
