"""Numpy reference of every op: the oracle of the tests and the implementation on CPU tensors."""
