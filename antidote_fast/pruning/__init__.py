"""A model: which weights are removed, and how."""
