"""dinoexport: a vision-transformer checkpoint goes in, a bundle proven to give PyTorch's tokens comes out."""

__version__ = "0.1.0"
