"""Ranks as processes, as threads, or as one rank alone."""
