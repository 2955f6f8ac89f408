"""What a real GPU shows and no other machine can: `python -m benchmarks.gpu`."""
