"""Quantising weights to FP8: the arithmetic of each rule, the Triton kernel, and refits that quantise."""
