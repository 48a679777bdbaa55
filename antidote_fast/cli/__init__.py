"""What a person types: commands, their flags and what they print."""

from antidote_fast.cli.entry import entry_point, main

__all__ = ["entry_point", "main"]
