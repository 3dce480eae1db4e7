"""Compare a candidate's outputs with PyTorch's. Nothing in this package builds anything."""
