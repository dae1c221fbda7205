"""Running experiments: members of one run, the points of a sweep, workers, and what each costs."""
