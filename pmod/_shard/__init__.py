"""Specs, and functions that run on shards."""
