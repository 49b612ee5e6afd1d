"""What a run has learnt, for other programs: models and features."""
