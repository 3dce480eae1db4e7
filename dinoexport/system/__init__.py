"""The operating system: files that are complete or absent, subprocesses, hardware facts, timing."""
