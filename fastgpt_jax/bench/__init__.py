"""Load on a server or an engine, and what came of it."""
