"""Requests that schemathesis makes from the OpenAPI document get no response with a status of 500 or above."""

from __future__ import annotations

import contextlib
import itertools

import pytest

from explorer import build_place
from tracin_ann.serve import Settings, create_app

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

from hypothesis import HealthCheck, given  # noqa: E402
from hypothesis import settings as limit  # noqa: E402
from hypothesis.errors import Unsatisfiable  # noqa: E402
from schemathesis import GenerationMode, checks  # noqa: E402

pytestmark = pytest.mark.slow
EXAMPLES = 60
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def api(tmp_path_factory):
    settings = Settings(hosts=None, most_queued_jobs=10_000)
    app = create_app(build_place(tmp_path_factory.mktemp("api")).location, settings)
    yield schemathesis.openapi.from_asgi("/api/v1/openapi.json", app)
    app.state.service.close()


def test_every_response_is_one_that_the_document_names(api):
    n_operations = 0
    for found, mode in itertools.product(api.get_all_operations(), GenerationMode):
        operation = found.ok()
        n_operations += mode is GenerationMode.POSITIVE

        @limit(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def call(case):
            case.call_and_validate(checks=CHECKS)

        # An operation without parameters has no invalid requests.
        with contextlib.suppress(*([Unsatisfiable] if mode is GenerationMode.NEGATIVE else [])):
            call()
    assert n_operations >= 11
