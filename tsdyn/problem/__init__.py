"""Inputs, images, teachers and students: everything that is drawn at random for each seed."""
