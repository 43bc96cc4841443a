"""Changes to other libraries that the core needs."""
