"""``--dry_run``: what a command would take, found without doing it."""
