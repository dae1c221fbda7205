"""Training ensembles of students: the general step, the batched one and the compiled ones."""
