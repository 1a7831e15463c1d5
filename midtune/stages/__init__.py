"""One file per command, each reading top to bottom as what the command does."""
