"""Integrations: tasks made from the training runs of other libraries, such as a run folder of the Trainer.

Nothing is imported here: each module imports its library when it is used, and `Task.from_transformers` and similar
methods import the module.
"""
