"""A pruned network as ONNX."""
