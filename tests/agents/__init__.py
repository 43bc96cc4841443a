"""Agents as their makers ship them, from npm and PyPI, on our doors, with a model that says what a script tells it."""
