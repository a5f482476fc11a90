"""The fused operators of `implementation="fused"`: Triton kernels, and the same in torch's operations."""
