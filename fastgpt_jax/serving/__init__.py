"""The server: an engine behind an OpenAI-compatible HTTP surface."""
