"""Formats in which weights of fewer bits are stored: bytes to tensors and back, one module per format; no layers."""
