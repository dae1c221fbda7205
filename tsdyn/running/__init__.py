"""Running experiments: the members of one run, the points of a sweep, workers, and estimates of cost."""
