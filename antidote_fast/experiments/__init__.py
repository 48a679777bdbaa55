"""Grids of cells, sweeps, their rows, tables and pictures."""
