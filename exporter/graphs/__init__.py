"""The ONNX graphs of a bundle, built from the steps of an architecture's description."""
