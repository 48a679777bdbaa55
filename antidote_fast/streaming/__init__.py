"""Models that do not fit in memory: one decoder block at a time."""
