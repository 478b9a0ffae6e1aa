"""Layers that the model families share; plain functions and NNX modules over whole sequences."""
