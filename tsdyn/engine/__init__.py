"""Training of ensembles of students: one general engine for any module, and faster batched and compiled ones."""
