"""What a run saves: memory and time, measured and estimated."""
