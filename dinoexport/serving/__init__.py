"""Served models: Triton repositories, clients, and checks of a live server."""
