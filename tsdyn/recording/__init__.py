"""Labelled archives of anybody's training loop: `tsdyn.Recorder`."""
