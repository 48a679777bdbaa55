"""Memory, processor, progress, signals."""
