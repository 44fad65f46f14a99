"""Spectral muP: settings tuned on a small model, for a wide and deep one."""
