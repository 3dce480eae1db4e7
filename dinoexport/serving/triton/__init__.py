"""A bundle as a served model: the repository Triton reads, and the code that runs inside its Python backend."""
