"""ONNX to TensorRT engines: optimisation profiles, the builder, and the process it runs in."""
