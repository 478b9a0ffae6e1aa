"""Patterns over graphs: what to look for, in combinators or as an example function, and the rules that rewrite it."""
