"""Autograd functions with factored gradients, and quantized tensors; no modules, no options, no files."""
