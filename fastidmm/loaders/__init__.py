"""One file per loader: four ways to deliver the same Batch."""
