"""Patches of libraries, a file each, called by who serves."""
