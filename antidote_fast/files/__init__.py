"""Bytes on disk: checkpoints, whole outputs, manifests, what was read."""
