"""Parameters, random numbers and batches of a training loop."""
