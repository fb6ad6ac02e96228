"""Builds in several processes and on clusters."""
