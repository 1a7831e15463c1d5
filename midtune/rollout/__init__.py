"""Sampling completions, and the hidden states that enter the first trained block."""
