"""``python -m antidote_fast`` is ``antidote-fast``."""

from antidote_fast.cli import entry_point

if __name__ == "__main__":
    entry_point()
