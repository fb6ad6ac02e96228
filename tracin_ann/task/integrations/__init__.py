"""Runs of other libraries as tasks: Transformers, PEFT, Lightning."""
