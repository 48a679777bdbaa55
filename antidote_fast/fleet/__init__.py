"""Many adapters of one base model."""
