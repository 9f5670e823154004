"""Who runs, and how they met."""
