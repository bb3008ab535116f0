"""Diagnosis of a model type: what it is made of, and whether its quantization holds."""
