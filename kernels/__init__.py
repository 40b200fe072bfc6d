"""Triton kernels, one file per op family; ``@triton.jit`` code only."""
