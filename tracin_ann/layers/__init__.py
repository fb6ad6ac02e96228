"""Layer rules: per-example gradients of a layer's parameters from its input and output gradient."""

from tracin_ann.layers.capture import LayerCapture, Layouts, covered_layers

__all__ = ["LayerCapture", "Layouts", "covered_layers"]
