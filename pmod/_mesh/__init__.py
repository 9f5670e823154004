"""Names for ranks."""
