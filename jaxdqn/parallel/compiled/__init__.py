"""Schemes that are one compiled program a chunk: populations, data parallelism, averaging, sharded networks."""
