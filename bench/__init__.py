"""Benchmarks: each scenario is a module with `run`; `perennial bench all` runs every one and writes `RESULTS.md`."""
