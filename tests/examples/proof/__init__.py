"""Proof of what averaging does: many small runs of four kinds, at constant and decayed rates."""
