"""Training libraries: tasks from runs of Transformers, PEFT and Lightning, learning rates, and records of runs."""
