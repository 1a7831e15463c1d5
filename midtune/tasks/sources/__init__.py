"""Where problems come from: files, hub datasets, a person's own Python, reasoning-gym, and `tiny-programs`."""
