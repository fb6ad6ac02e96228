"""Integrations: tasks from runs of training libraries, records of runs, and data sets in common formats."""
