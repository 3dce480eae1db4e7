"""dinoexport: a checkpoint goes in, a bundle proven to give PyTorch's outputs comes out."""

__version__ = "0.1.0"
