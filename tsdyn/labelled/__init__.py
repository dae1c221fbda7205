"""Labelled arrays with torch tensors inside, so that derivatives pass through xarray code."""
