"""The commands: absl flags become a frozen dataclass at once, and one library call each does the work."""
