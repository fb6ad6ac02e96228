"""One adapter for each library that is compared."""
