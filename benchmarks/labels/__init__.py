"""Detection of wrong training labels."""
