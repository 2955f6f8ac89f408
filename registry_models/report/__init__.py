"""Reports a person reads: one self-contained HTML page, plots as PNG, a note in markdown. Knows no MLflow."""
