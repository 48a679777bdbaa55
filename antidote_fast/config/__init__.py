"""One frozen dataclass a command, and flags and YAML files that fill it."""
