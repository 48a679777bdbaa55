"""Records, templates, batches."""
