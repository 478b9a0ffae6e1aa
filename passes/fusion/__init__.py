"""Passes that make one operation of several which belong together, one a file."""
