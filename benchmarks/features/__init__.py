"""Time and memory of feature extraction."""
