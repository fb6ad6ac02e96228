"""Integrations: tasks from the runs of training libraries, and data sets in common formats."""
