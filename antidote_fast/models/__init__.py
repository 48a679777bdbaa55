"""Models and adapters: loading, targets, blocks, forwards."""
