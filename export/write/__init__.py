"""What an export writes: decoder/, vision.onnx, decoder.onnx, and the folder it works in."""
