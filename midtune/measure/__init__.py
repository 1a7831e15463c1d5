"""Time and memory of this process and of cards, as they are measured."""
