"""What a seed draws: inputs, images, teacher and student."""
