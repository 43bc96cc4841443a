"""Benchmarks: each scenario is a module with `run`, and `perennial bench` lists them."""
