"""A model: the norms of what flows into its layers."""
