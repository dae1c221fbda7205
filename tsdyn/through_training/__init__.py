"""Derivatives through training: of what a run ends with, in everything that it starts from."""
