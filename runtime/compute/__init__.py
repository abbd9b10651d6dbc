"""Passes through the model on onnxruntime, and the backends of attention."""
