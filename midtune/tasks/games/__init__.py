"""Text games that a policy plays in turns."""
