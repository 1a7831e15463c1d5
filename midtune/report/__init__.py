"""What a run tells people: statistics, the report, tables and the live display."""
