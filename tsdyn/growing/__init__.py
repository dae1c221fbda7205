"""What is done with archives after the runs: measure more from them, add it to them, compare them."""
