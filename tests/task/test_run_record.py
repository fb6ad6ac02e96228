"""Reading the record of a run, `tracin.json`: a damaged or missing one is rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recorded_runs import train
from tracin_ann import Checkpoint
from tracin_ann.errors import CheckpointError
from tracin_ann.task import read_order, read_run_record


def damage(content: dict[str, Any], place: tuple[Any, ...], value: object) -> None:
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = value


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), "other", "format 'other', version 1"),
        (("version",), 2, "format 'tracin-run', version 2"),
        (("checkpoints",), [], "no checkpoints"),
        (("checkpoints",), {}, "no checkpoints"),
        (("checkpoints", 0), 3, "checkpoint 0 is a int"),
        (("checkpoints", 0, "step"), "one", "checkpoint 0 has step 'one'"),
        (("checkpoints", 1, "step"), 1, "checkpoints at steps 1, 1, which do not increase"),
        (("checkpoints", 1, "loss"), "low", "checkpoint 1 has loss 'low'"),
        (("checkpoints", 1, "learning_rates"), -1, "checkpoint 1 has learning rates -1"),
        (("checkpoints", 1, "learning_rates"), {}, "checkpoint 1 has learning rates {}"),
        (("checkpoints", 1, "learning_rates"), {"a": True}, "checkpoint 1 has learning rates {'a': True}"),
        (("checkpoints", 1, "path"), "/etc/passwd", "has path '/etc/passwd', which is not below the folder"),
        (("checkpoints", 1, "path"), "../a", "has path '../a', which is not below the folder"),
        (("checkpoints", 1, "path"), "tracin/a.pt", "checkpoint 1 names tracin/a.pt, which does not exist"),
        (("checkpoints", 1, "optimizer"), 3, "has path 3, which is not below the folder"),
        (("checkpoints", 1, "momentum"), 1.0, "checkpoint 1 has momentum 1.0"),
        (("checkpoints", 1, "momentum"), "heavy", "checkpoint 1 has momentum 'heavy'"),
        (("order",), "absent", "order names absent, which does not exist"),
    ],
)
def test_a_damaged_record_is_rejected_in_one_line(
    tmp_path: Path, place: tuple[Any, ...], value: object, message: str
) -> None:
    train(tmp_path, [4.0, 1.0])[0].close()
    content = json.loads((tmp_path / "tracin.json").read_text())
    damage(content, place, value)
    (tmp_path / "tracin.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.from_run(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/tracin.json is damaged: got ")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_truncated_record_is_rejected_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"^the run has no record: got no file {tmp_path}/tracin.json, expected"):
        read_run_record(tmp_path)
    train(tmp_path, [4.0])[0].close()
    text = (tmp_path / "tracin.json").read_text()
    for wrong in (text[:50], "[]", ""):
        (tmp_path / "tracin.json").write_text(wrong)
        with pytest.raises(
            CheckpointError, match=r"^[^\n]*expected a JSON object; restore the file, or give the check"
        ):
            read_run_record(tmp_path)
    (tmp_path / "tracin.json").write_text(text)
    with pytest.raises(CheckpointError, match="contains no order of examples"):
        next(read_order(tmp_path))
