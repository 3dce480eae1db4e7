"""PyTorch modules to ONNX: traced once, written with streamed weights, quantised."""
