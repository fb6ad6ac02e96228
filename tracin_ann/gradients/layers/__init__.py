"""Layer rules: the per-example gradients of a layer's parameters from its inputs and output gradients."""
