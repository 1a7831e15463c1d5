"""Choosing: which block is worth training, how sure that is, and what it costs."""
