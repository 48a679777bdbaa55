"""The training loop, what a step's loss is, and its checkpoints."""
