"""Timings of mamba_ops and its peers: ``python -m benchmarks.run``, ``.table``, ``.compare``."""
