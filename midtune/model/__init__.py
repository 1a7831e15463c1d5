"""The policy: where a model comes from, how its blocks are held, thawed and saved."""
