"""Expectations over Gaussian inputs in closed form."""
