"""Measurements, each a `make` target."""
