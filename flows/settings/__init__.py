"""Settings: environment variables and project files, read in one place."""
