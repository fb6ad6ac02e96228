"""Layer rules: per-example gradients of a layer's parameters from its input and output gradient."""

from tracin_ann.layers.capture import OUTPUTS, PARAMETERS, LayerCapture, Layouts, covered_layers, covered_rows

__all__ = ["OUTPUTS", "PARAMETERS", "LayerCapture", "Layouts", "covered_layers", "covered_rows"]
