"""Feature extraction compared with other libraries."""
