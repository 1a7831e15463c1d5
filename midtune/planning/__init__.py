"""What a step would take: memory and time, worked out from a model's configuration alone."""
