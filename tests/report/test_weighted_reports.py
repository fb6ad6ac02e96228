"""A report names what weighs the gradients of its scores: learning rates by parameter, and a preconditioner."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from tasks.toy import CONFIG, Toy, make_toy_task
from tracin_ann import Checkpoint, InfluenceIndex, build, write_report

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
RATES = {"first.*": 0.1, "second.*": 0.2}
RATES_FACT = ("learning rates", "differ between parameters")


@pytest.mark.parametrize(
    ("kind", "rate", "expected"),
    [
        ("none", 0.1, set()),
        ("none", RATES, {RATES_FACT}),
        ("adam", 0.1, {("preconditioner", "adam")}),
        ("trackstar", RATES, {RATES_FACT, ("preconditioner", "trackstar")}),
    ],
)
def test_the_facts_of_a_report_name_the_weights(kind, rate, expected, tmp_path):
    model = Toy()
    torch.save(model.state_dict(), tmp_path / "0.pt")
    moments = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    checkpoint = Checkpoint(tmp_path / "0.pt", rate, second_moments=lambda: moments)
    task = make_toy_task(tmp_path, checkpoints=[checkpoint])
    build(task, tmp_path / "out", replace(CONFIG, preconditioner=kind))
    index = InfluenceIndex.open(tmp_path / "out", task, device="cpu")
    page = write_report(index.query([0]), tmp_path / "page.html", index).read_text()
    facts = set(re.findall(r"<dt>(.*?)</dt>\s*<dd>(.*?)</dd>", page))
    assert ("training rows", "10") in facts
    assert {fact for fact in facts if fact[0] in ("learning rates", "preconditioner")} == expected
