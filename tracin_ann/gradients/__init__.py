"""Per-example gradients: by layer rules, forward mode, vmap(grad) or a loop, each proven against autograd."""

from __future__ import annotations

from tracin_ann.gradients.autograd import requiring_grad, without_graph
from tracin_ann.gradients.buffers import Room, Scratch, fresh
from tracin_ann.gradients.convolution import Convolution, channels_last
from tracin_ann.gradients.engine import Batch, GradientEngine, Sink
from tracin_ann.gradients.factors import (
    Dense,
    Form,
    Outer,
    Rows,
    column_blocks,
    converted,
    form_dtype,
    inner_where,
    materialised,
    squared_norm,
)
from tracin_ann.gradients.plan import NONE, STEPS, Plan
from tracin_ann.gradients.probes import probe_examples, probe_gradients, probe_losses, probe_shown, sound
from tracin_ann.gradients.proof import no_gradient, not_finite

__all__ = [
    "Batch",
    "Convolution",
    "Dense",
    "Form",
    "GradientEngine",
    "NONE",
    "Outer",
    "Plan",
    "Room",
    "Rows",
    "STEPS",
    "Scratch",
    "Sink",
    "channels_last",
    "column_blocks",
    "converted",
    "form_dtype",
    "fresh",
    "inner_where",
    "materialised",
    "no_gradient",
    "not_finite",
    "probe_examples",
    "probe_gradients",
    "probe_losses",
    "probe_shown",
    "requiring_grad",
    "sound",
    "squared_norm",
    "without_graph",
]
