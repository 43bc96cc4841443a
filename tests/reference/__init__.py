"""Oracles: slow, obviously right, and independent of the code that they judge."""
