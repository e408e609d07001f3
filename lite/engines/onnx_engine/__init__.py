"""The engine that computes with ONNX Runtime alone."""
