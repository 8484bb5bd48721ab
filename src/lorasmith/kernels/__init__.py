"""Triton twins of ops, forward and backward passes on plain tensors. Never: autograd, a model."""
