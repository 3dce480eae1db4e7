"""Export PyTorch modules to ONNX: trace once, write with streamed weights, quantise."""
