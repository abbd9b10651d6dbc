"""Benchmarks: measured next to the physical floor, never asserted in tests."""
