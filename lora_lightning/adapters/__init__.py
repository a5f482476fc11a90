"""What is done to a model with a plan: inject, select, merge, combine, mix, quantize, verify; no files."""
