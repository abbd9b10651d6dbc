"""Checkpoint -> bundle: ONNX segments, quantized weights, calibrated keys."""
