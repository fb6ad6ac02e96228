"""Per-example gradients of a model's parameters, in factor form and verified against autograd.

They are computed by layer rules, `vmap(grad)`, forward mode or a loop over the examples.
"""

from __future__ import annotations

from tracin_ann.gradients.autograd import detach_graph, require_grad
from tracin_ann.gradients.buffers import Allocator, Scratch, allocate
from tracin_ann.gradients.convolution_factor import Convolution, channels_last
from tracin_ann.gradients.directional import DIFFERENTIATE, FORWARD_MODE, Derivatives
from tracin_ann.gradients.engine import Batch, GradientEngine
from tracin_ann.gradients.factors import (
    Dense,
    Form,
    Outer,
    Rows,
    Sink,
    batch_size,
    column_blocks,
    convert,
    form_dtype,
    inner_where,
    materialise,
    squared_norm,
    weighted_sums,
)
from tracin_ann.gradients.plan import METHODS, NONE, Plan
from tracin_ann.gradients.probes import (
    probe_description,
    probe_examples,
    probe_gradients,
    probe_losses,
    replace_nonfinite,
)
from tracin_ann.gradients.proof import describe_no_gradient, describe_nonfinite
from tracin_ann.gradients.scales import GradientScales

__all__ = [
    "Allocator",
    "Batch",
    "Convolution",
    "DIFFERENTIATE",
    "Dense",
    "Derivatives",
    "FORWARD_MODE",
    "Form",
    "GradientEngine",
    "GradientScales",
    "METHODS",
    "NONE",
    "Outer",
    "Plan",
    "Rows",
    "Scratch",
    "Sink",
    "allocate",
    "batch_size",
    "channels_last",
    "column_blocks",
    "convert",
    "describe_no_gradient",
    "describe_nonfinite",
    "detach_graph",
    "form_dtype",
    "inner_where",
    "materialise",
    "probe_description",
    "probe_examples",
    "probe_gradients",
    "probe_losses",
    "replace_nonfinite",
    "require_grad",
    "squared_norm",
    "weighted_sums",
]
