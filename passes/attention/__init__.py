"""Attention, found in whatever way it is written."""
