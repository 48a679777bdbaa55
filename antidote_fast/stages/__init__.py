"""Whole jobs: align, fine-tune, prune, evaluate. Each stage reads a folder and writes a folder."""
