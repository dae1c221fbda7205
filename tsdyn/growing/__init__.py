"""What happens to an archive after its run: measured, extended, exported, imported."""
