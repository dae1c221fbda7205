"""What people do to a directory of tsdyn's, in any order, against a model: the numbers of an undisturbed run.

`actions.Directory` is a Hypothesis state machine.  Its rules run, kill, resume, extend, fork, validate, repair, open,
copy, move, damage and exchange; the model (`model`) knows which epochs were reported as committed, what was damaged,
and every number.  After each rule three things must hold (`checks`).  What is shown under a label is the model's
number: the same bits if the engine is the same, rounding otherwise.  No committed epoch is lost unless a rule damaged
its bytes, and that is then said.  What is refused is refused in a sentence of the library's own.  The suite makes 100
steps, `python -m tests.torture` 2,000.
"""
