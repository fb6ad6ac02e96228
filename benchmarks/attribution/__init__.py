"""Attribution: do scores predict what retraining does? Linear datamodeling scores, removal, and other libraries."""
