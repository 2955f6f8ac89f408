"""What else a step shows: registration, isolation, buffers, averages, the step function's conduct."""
