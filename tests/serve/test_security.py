"""Who may connect: names of the server, the token, requests from other sites, headers, sizes of bodies."""

from __future__ import annotations

import asyncio
import re

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from explorer import LOCAL, serve
from tracin_ann.serve import Settings
from tracin_ann.serve.app import add_error_responses
from tracin_ann.serve.dependencies import CheckedForm, make_template_context
from tracin_ann.serve.security import Gate, own_address

TOKEN = "a-token-of-the-tests"
JOB = {"kind": "self-influence"}


@pytest.fixture(scope="module")
def guarded(place):
    with serve(place.location, Settings(token=TOKEN, upload_bytes=5000)) as client:
        yield client


@pytest.fixture(autouse=True)
def _forget_cookies(guarded):
    guarded.cookies.clear()


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8321", "localhost:1", "[::1]:8321", "LOCALHOST"])
def test_names_of_the_server(client, host):
    assert client.get("/api/v1/index", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize("host", ["example.com", "127.0.0.1.example.com", "", "[", "localhost@example.com", "::1"])
def test_other_hosts_are_rejected(client, host):
    response = client.get("/api/v1/index", headers={"Host": host})
    assert response.status_code == 400
    assert response.json()["error"]["what"] == "the request names another host"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 202),
        ({"Sec-Fetch-Site": "same-origin", "Origin": LOCAL}, 202),
        ({"Sec-Fetch-Site": "none"}, 202),
        ({"Origin": LOCAL}, 202),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://127.0.0.1:99"}, 403),
        ({"Origin": "http://127.0.0.1:99"}, 403),
        ({"Origin": "http://example.com"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
    ],
)
def test_other_sites_change_nothing(client, headers, status):
    assert client.post("/api/v1/jobs", json=JOB, headers=headers).status_code == status
    if status == 403:
        assert client.get("/api/v1/index", headers=headers).status_code == 200


def test_other_sites_read_nothing(client):
    response = client.get("/api/v1/index", headers={"Origin": "http://example.com"})
    assert not [name for name in response.headers if name.startswith("access-control")]
    assert response.headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert client.options("/api/v1/jobs", headers={"Origin": "http://example.com"}).status_code == 405


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        (TOKEN, 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN}\xe9", 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer  {TOKEN} ", 200),
    ],
)
def test_the_api_needs_the_token(guarded, header, status):
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    response = guarded.get("/api/v1/index", headers=headers)
    assert response.status_code == status
    assert (response.headers.get("WWW-Authenticate") == "Bearer") == (status == 401)


def test_a_browser_logs_in_once(guarded):
    asked = guarded.get("/rows/train/3?a=1&b=2")
    assert (asked.status_code, asked.headers["Location"]) == (303, "/login?next=/rows/train/3%3Fa%3D1%26b%3D2")
    form = guarded.get(asked.headers["Location"])
    action = re.search('action="(.*?)"', form.text)[1].replace("&amp;", "&")
    wrong = guarded.post(action, data={"token": "wrong"})
    assert wrong.status_code == 401 and "not the token" in wrong.text
    right = guarded.post(action, data={"token": TOKEN})
    assert (right.status_code, right.headers["Location"]) == (303, "/rows/train/3?a=1&b=2")
    assert TOKEN not in right.headers["Set-Cookie"]
    assert "HttpOnly" in right.headers["Set-Cookie"] and "SameSite" in right.headers["Set-Cookie"]
    assert guarded.get("/api/v1/index").status_code == 200


def test_an_address_with_the_token_does_not_log_in(guarded):
    page = guarded.get("/login", params={"token": TOKEN})
    assert page.status_code == 200 and TOKEN not in page.text
    assert guarded.get("/api/v1/index").status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        {"content": b"token=" + b"x" * 5000},
        {"content": iter([b"x" * 3000] * 3)},
        {"content": TOKEN.encode()},
        {"files": {"token": ("a", TOKEN)}},
        {"content": b"--", "headers": {"Content-Type": "multipart/form-data; boundary=a"}},
        {"content": b"token=%ff\xff"},
        {"content": b""},
    ],
)
def test_other_logins_are_rejected(guarded, body):
    assert guarded.post("/login", **body).status_code in (401, 413)
    assert guarded.get("/api/v1/index").status_code == 401


def test_a_login_reads_no_more_than_the_token():
    """A body of unknown length is not read to its end."""
    n_sent, sent = 0, []

    async def receive():
        nonlocal n_sent
        n_sent += 1
        assert n_sent < 10
        return {"type": "http.request", "body": b"x" * 4000, "more_body": True}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/login", "query_string": b"", "headers": [(b"host", b"h")]}
    asyncio.run(Gate(FastAPI(), Settings(token=TOKEN, hosts=None))(scope, receive, send))
    assert sent[0]["status"] == 401


@pytest.mark.parametrize(
    "address", ["//example.com", "///example.com", "/\\example.com", "http://example.com", "", "/\n/example.com", "/é"]
)
def test_redirections_lead_to_this_server_only(guarded, address):
    assert own_address(address) == "/"
    response = guarded.post("/login", params={"next": address}, data={"token": TOKEN})
    assert response.headers["Location"] == "/"


def test_the_address_after_login_is_escaped(guarded):
    page = guarded.get("/login", params={"next": "/'\"><script>alert(1)</script>"}).text
    assert "<script" not in page
    assert 'action="/login?next=/%27%22%3E%3Cscript%3Ealert%281%29%3C/script%3E"' in page


def test_a_login_from_another_site_is_rejected(guarded):
    response = guarded.post("/login", data={"token": TOKEN}, headers={"Origin": "http://example.com"})
    assert response.status_code == 403


def test_clients_without_the_token_read_nothing_about_the_index(guarded, client, place):
    name, site = place.directory.name, {"Origin": "http://example.com"}
    rejected = [
        guarded.get("/"),
        guarded.post("/decisions"),
        guarded.post("/decisions", headers=site),
        guarded.get("/login"),
        client.get("/", headers={"Host": "example.com"}),
    ]
    for response in rejected:
        assert response.status_code in (200, 303, 400, 401)
        assert name not in response.text.replace("the index", "") and "generation" not in response.text
    assert name in client.post("/decisions", headers=site).text


@pytest.mark.parametrize("dest", ["image", "iframe", "script", "empty", "document"])
@pytest.mark.parametrize("site", ["cross-site", "same-site", "same-origin", "none"])
def test_other_sites_link_to_pages_but_do_not_embed_them(client, dest, site):
    response = client.get("/suspects", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Dest": dest})
    assert response.status_code == (403 if site in ("cross-site", "same-site") and dest != "document" else 200)


@pytest.mark.parametrize("address", ["/", "/api/v1/openapi.json", "/static/any.js", "/login/x", "//login"])
def test_nothing_is_served_without_the_token(guarded, address):
    assert guarded.get(address).status_code in (303, 401)
    assert guarded.post(address).status_code == 401


@pytest.mark.parametrize("address", ["/api/v1/index", "/none", "/api/v1/rows/train/99"])
def test_every_response_has_the_headers(client, address):
    first, second = client.get(address).headers, client.get(address).headers
    policy = first["Content-Security-Policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy and "default-src 'none'" in policy
    assert policy != second["Content-Security-Policy"], "the nonce is new in every response"
    assert first["X-Content-Type-Options"] == "nosniff"
    assert first["Cache-Control"] == "no-store"


def test_large_bodies_are_rejected(guarded):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    stated = guarded.post("/api/v1/answers", content=b"x" * 5001, headers=headers)
    unstated = guarded.post("/api/v1/answers", content=iter([b"x" * 3000] * 3), headers=headers)
    for response in (stated, unstated):
        assert response.status_code == 413, response.text
        assert response.json()["error"]["what"] == "the request is too large"


@pytest.fixture
def forms():
    """Return a client of an application with one form."""
    app = FastAPI()
    app.add_middleware(Gate, settings=Settings())
    add_error_responses(app)
    app.state.service = type("Service", (), {"generation": 1})()

    @app.get("/")
    def show(request: Request) -> dict:
        return make_template_context(request)

    @app.post("/", dependencies=[CheckedForm])
    def change() -> str:
        return "changed"

    return TestClient(app, base_url=LOCAL)


def test_forms_need_their_token(forms):
    token = forms.get("/").json()["csrf"]
    assert forms.get("/").json()["csrf"] == token, "the cookie identifies the browser"
    assert forms.post("/", data={"csrf": token}).status_code == 200
    assert forms.post("/", headers={"X-CSRF-Token": token}).status_code == 200
    for response in (
        forms.post("/"),
        forms.post("/", data={"csrf": ""}),
        forms.post("/", data={"csrf": "é"}),
        forms.post("/", files={"csrf": b"x"}),
        forms.post("/", headers={"X-CSRF-Token": token[:-1]}),
    ):
        assert response.status_code == 403
    forms.cookies.clear()
    assert forms.post("/", data={"csrf": token}).status_code == 403
