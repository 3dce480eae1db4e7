"""The build: a request, its stages, and the workspace that keeps finished ones."""
