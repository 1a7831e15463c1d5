"""The policy: find and load a model; hold, thaw and save its blocks."""
