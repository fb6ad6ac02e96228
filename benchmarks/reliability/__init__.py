"""Behaviour under damage, kills, concurrent access and long use."""
