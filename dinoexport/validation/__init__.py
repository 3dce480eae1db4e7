"""Is a candidate's output still PyTorch's? Nothing in this package builds anything."""
