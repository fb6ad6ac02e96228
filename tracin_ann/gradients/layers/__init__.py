"""Layer rules: per-example gradients of a layer's parameters from its input and output gradient."""
