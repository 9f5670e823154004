"""The table of collectives, and what is composed of it."""
