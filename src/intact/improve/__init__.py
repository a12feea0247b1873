"""Networks that quantize better: each method takes a float network and returns another."""

from intact.improve.bias_correction import correct_biases
from intact.improve.equalization import equalize

__all__ = ["correct_biases", "equalize"]
