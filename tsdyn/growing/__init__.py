"""What happens to an archive after its run: measured, extended, compared, exported, imported."""
