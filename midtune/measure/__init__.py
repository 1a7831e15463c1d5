"""Measured time and memory of this process and of cards."""
