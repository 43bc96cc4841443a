"""Makes seedling, the bundled test model: its corpus, its training, its card."""
