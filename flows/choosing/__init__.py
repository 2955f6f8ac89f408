"""What a night audits, in which flow runs, and what it came to."""
