"""What sends, and nothing else does."""
