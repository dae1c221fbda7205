"""A package of somebody else's: one part of every kind."""
