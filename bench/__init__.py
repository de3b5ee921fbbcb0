"""Benchmarks: flatstep against the time that memory allows, and against its peers."""
