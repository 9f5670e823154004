"""What looks on while collectives run."""
