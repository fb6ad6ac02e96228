"""Golden numbers of every sketch: an upgrade must not change the projections of indexes on disk.

`python tests/sketch/test_sketch_golden.py` rewrites the file; do so only together with a higher version.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tracin_ann.gradients.factors import Dense
from tracin_ann.sketch import SKETCHES, ParameterKey, make_sketch
from tracin_ann.sketch.generator import Stream

GOLDEN = Path(__file__).parent / "golden" / "sketches.json"
REMEDY = "if this is intended, raise the sketch's version and run python tests/sketch/test_sketch_golden.py"

DIM = 6
# Large enough that the factored sketch uses TensorSketch for a layer called once.
ONCE = (10, 60)
SHAPES = [(), (3,), (9,), (5, 4), (2, 130), (140, 2, 2), (130, 140)]
STREAMS = [
    Stream(0, 0, "weight", "dense"),
    Stream(1, 0, "weight", "dense"),
    Stream(0, 1, "weight", "dense"),
    Stream(123456789, 7, "layers.0.größe", "left"),
]


def fixed_gradient(shape: tuple[int, ...]) -> Dense:
    """Return the gradients of two examples: small whole numbers that are not all equal."""
    place = torch.arange(2 * int(np.prod(shape)), dtype=torch.float64).view(2, -1)
    return Dense((7 * place + 3) % 11 - 5)


def sketch_numbers(name: str, shape: tuple[int, ...], rank_one: bool = False) -> list[list[float]]:
    out = torch.zeros(2, DIM, dtype=torch.float64)
    key = ParameterKey(4, 2, "layer.weight", shape, rank_one)
    make_sketch(name, DIM).parameter(key, torch.device("cpu"), torch.float64).add(out, fixed_gradient(shape))
    return out.tolist()


def stream_numbers(stream: Stream) -> dict[str, Any]:
    return {
        "words": stream.words(0, 5).tolist(),
        "words from 1001": stream.words(1001, 2).tolist(),
        "signs": stream.signs(0, 70).tolist(),
        "signs from 1001": stream.signs(1001, 5).tolist(),
        "gaussians": [float(x) for x in stream.gaussians(0, 5)],
        "gaussians from 1001": [float(x) for x in stream.gaussians(1001, 2)],
        "integer below 1000": stream.integer(1000),
    }


def golden_numbers() -> dict[str, Any]:
    """Return all numbers of the golden file, computed by the present library."""
    return {
        "streams": {str(stream): stream_numbers(stream) for stream in STREAMS},
        "sketches": {
            name: {
                "version": make_sketch(name, DIM).version,
                "rows": {str(shape): sketch_numbers(name, shape) for shape in SHAPES},
                "rows of layers called once": sketch_numbers(name, ONCE, rank_one=True),
            }
            for name in SKETCHES
        },
    }


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_file_covers_all_sketches_and_streams(golden):
    assert set(golden["sketches"]) == set(SKETCHES), REMEDY
    assert set(golden["streams"]) == {str(stream) for stream in STREAMS}, REMEDY


@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_streams_give_the_golden_numbers(stream, golden):
    pinned, found = golden["streams"][str(stream)], stream_numbers(stream)
    assert set(found) == set(pinned)
    for kind, numbers in found.items():
        if kind.startswith("gaussians"):
            np.testing.assert_allclose(numbers, pinned[kind], rtol=1e-6, err_msg=f"{kind}: {REMEDY}")
        else:
            assert numbers == pinned[kind], f"{kind}: {REMEDY}"


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_give_the_golden_numbers_of_their_version(name, golden):
    pinned = golden["sketches"][name]
    version = make_sketch(name, DIM).version
    assert version == pinned["version"], f"{GOLDEN.name} has version {pinned['version']}; rewrite it: see {__file__}"
    for shape in SHAPES:
        np.testing.assert_allclose(
            sketch_numbers(name, shape),
            pinned["rows"][str(shape)],
            rtol=1e-6,
            atol=1e-6,
            err_msg=f"{name} of {shape} changed within version {version}: {REMEDY}",
        )


@pytest.mark.parametrize("name", SKETCHES)
def test_sketches_of_layers_called_once_give_the_golden_numbers_of_their_version(name, golden):
    pinned = golden["sketches"][name]["rows of layers called once"]
    np.testing.assert_allclose(
        sketch_numbers(name, ONCE, rank_one=True), pinned, rtol=1e-6, atol=1e-6, err_msg=f"{name} changed: {REMEDY}"
    )


def test_rows_of_the_factored_sketch_are_whole_numbers(golden):
    """Signs and sums of whole numbers are exact, so these numbers are equal to the last bit."""
    rows = golden["sketches"]["factored"]["rows"]
    for shape in SHAPES:
        assert sketch_numbers("factored", shape) == rows[str(shape)], REMEDY
        assert np.array_equal(np.rint(rows[str(shape)]), rows[str(shape)])


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    text = re.sub(r"\n\s+(?=[-\d])|(?<=\d)\n\s+(?=\])", "", json.dumps(golden_numbers(), indent=1))
    GOLDEN.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {GOLDEN}")
