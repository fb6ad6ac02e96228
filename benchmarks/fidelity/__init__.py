"""Accuracy of sketched scores against true TracInCP scores."""
