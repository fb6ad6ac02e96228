"""Second moments in state dicts of optimizers that have names of parameters instead of numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tracin_ann import Checkpoint
from tracin_ann.task import read_second_moments


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_names_in_the_state_are_used_whatever_the_order_of_the_parameters(prefix):
    """The optimizer has the layers in the other order, and all weights have one shape."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    named = [*model[1].named_parameters(prefix="1"), *model[0].named_parameters(prefix="0")]
    optimizer = torch.optim.AdamW([parameter for _, parameter in named])
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    state = {
        "state": {prefix + name: optimizer.state[parameter] for name, parameter in named},
        "param_groups": [{**optimizer.param_groups[0], "params": [prefix + name for name, _ in named]}],
    }
    names = [name for name, _ in model.named_parameters()]
    found = read_second_moments(Checkpoint("unused.pt", 0.1, second_moments=lambda: state), model, names, names)
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name].value, optimizer.state[parameter]["exp_avg_sq"])
        assert found[name].correction == pytest.approx(1 - 0.999)
