"""The same work through midtune and through TRL, side by side."""
