"""The results store: Parquet files of rows and audits, read back, compared and queried. Knows no numerics."""
