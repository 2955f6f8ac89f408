"""The way of one audit: files, child process, results stored, published, marked, committed."""
