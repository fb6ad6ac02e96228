"""Pages show what the library returns, at addresses that show it again, and change nothing without their token."""

from __future__ import annotations

import io
import json
import re
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from explorer import CONFIG, N_QUERIES, N_TRAIN, make_row, make_task, serve
from tracin_ann import QueryOptions, build
from tracin_ann.analysis import explain, find_hubs, find_mislabelled
from tracin_ann.errors import UsageError
from tracin_ann.report import format_score
from tracin_ann.serve import IndexLocation, Settings, create_app, service
from tracin_ann.serve.decisions import Decisions, default_path
from tracin_ann.serve.pages.addresses import QueryForm, format_ranges, make_address, read_ranges
from tracin_ann.serve.pages.images import LinkedImages
from tracin_ann.serve.pages.pairs import ExplainPair
from tracin_ann.serve.work import ComputeExactAnswers, FindHubs
from tracin_ann.store import RowFilter

PAGES = [
    "/",
    "/query",
    "/query?rows=0-1",
    "/rows/3",
    "/pair?row=3&query=1",
    "/suspects",
    "/compare",
    "/hubs",
    "/duplicates",
]


class Parsed(HTMLParser):
    """The elements of a page with their attributes, and its texts."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)

    def find(self, tag, **attributes):
        return [
            a for t, a in self.elements if t == tag and all(a.get(name) == value for name, value in attributes.items())
        ]

    @property
    def addresses(self):
        names = {"a": "href", "img": "src", "link": "href", "script": "src"}
        return [str(a[names[t]]) for t, a in self.elements if t in names and names[t] in a]


def load(client, address):
    """Return a page whose jobs have ended."""
    while True:
        response = client.get(address)
        assert response.status_code == 200, response.text
        page = Parsed(response.text)
        if not page.find("div", id="progress"):
            return page
        time.sleep(0.01)


def find_hits(page):
    return [int(a["href"].rpartition("/")[2]) for a in page.find("a", **{"class": "id"})]


@pytest.mark.parametrize("address", PAGES)
def test_every_page_is_complete_and_stays_on_the_site(client, address):
    page = load(client, address)
    assert all(found.startswith(("/", "#")) and not found.startswith("//") for found in page.addresses)
    assert not [a for _, a in page.elements if "style" in a or any(name.startswith("on") for name in a)]
    assert not page.find("style") and all(a.get("src") for a in page.find("script"))
    assert len(page.find("h1")) == 1 and len(page.find("main")) == 1
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = "".join(page.texts)
    assert "{{" not in labelled and "None" not in labelled


@pytest.mark.slow
def test_all_links_of_all_pages_work(client):
    found = [address.partition("#")[0] for page in PAGES for address in load(client, page).addresses]
    assert [address for address in dict.fromkeys(found) if address and client.get(address).status_code != 200] == []


def test_answers_are_those_of_the_library(client, index):
    page = load(client, "/query?rows=2&k=4&score=cosine&where=label%3D1%3B+label<2")
    (answer,) = index.query([2], (), QueryOptions(k=4, score="cosine", rows=RowFilter(where=("label=1", "label<2"))))
    assert find_hits(page) == [hit.row for hit in answer.hits] and answer.hits
    text = " ".join(page.texts)
    assert all(format_score(hit.score) in text for hit in answer.hits)


def test_exact_answers_replace_the_stored_ones(place):
    with serve(place.location) as client:
        stored = index_hits(place.open(), "stored")
        exact = index_hits(place.open(), "exact")
        address = "/query?rows=0&k=5&rerank=exact&candidates=9"
        assert find_hits(load(client, address)) == exact
        # The script of a page gets the progress only, or the finished page.
        reply = client.get(address, headers={"HX-Request": "true"})
        assert find_hits(Parsed(reply.text)) == exact
        assert find_hits(load(client, "/query?rows=0&k=5")) == stored


def test_stored_answers_are_shown_while_a_job_uses_the_model(place, monkeypatch):
    run, may_end = ComputeExactAnswers.run, threading.Event()

    def run_when_allowed(self, index, steps):
        assert may_end.wait(90)
        return run(self, index, steps)

    monkeypatch.setattr(ComputeExactAnswers, "run", run_when_allowed)
    end = threading.Timer(60, may_end.set)
    end.start()
    with serve(place.location) as client:
        for address in ("/query?rows=0&k=5&rerank=exact&candidates=9", "/query?text=abc&k=5&rerank=exact&candidates=9"):
            may_end.clear()
            page = Parsed(client.get(address).text)
            assert page.find("div", id="progress") and len(find_hits(page)) == 10
            reply = client.get(address, headers={"HX-Request": "true"})
            assert "progress" in reply.text and not may_end.is_set()
            may_end.set()
            assert len(find_hits(load(client, address))) == 10
    end.cancel()


@pytest.mark.parametrize(
    ("work", "address"), [(ExplainPair, "/pair?row=3&query=1&score=cosine"), (FindHubs, "/hubs?k=7")]
)
def test_progress_is_shown_while_a_job_uses_the_model(place, monkeypatch, work, address):
    may_end = threading.Event()

    def wait(self, index, steps):
        assert may_end.wait(90)
        raise UsageError("ended")

    monkeypatch.setattr(work, "run", wait)
    end = threading.Timer(60, may_end.set)
    end.start()
    with serve(place.location) as client:
        for headers in ({}, {"HX-Request": "true"}):
            assert "progress" in client.get(address, headers=headers).text and not may_end.is_set()
        may_end.set()
    end.cancel()


def index_hits(index, rerank):
    (answer,) = index.query([0], (), QueryOptions(k=5, rerank=rerank, candidates=9))
    return [hit.row for hit in answer.hits]


@pytest.mark.parametrize("address", ["/query?rows=0-2&together=yes&k=3&rerank=exact", "/compare?rows=0&rerank=exact"])
def test_no_request_computes_exact_scores_itself(place, address, monkeypatch):
    with serve(place.location) as client:
        asked = []

        def note(question, rows):
            asked.append(question.options.rerank)
            return answer(question, rows)

        answer = service._answer
        monkeypatch.setattr(service, "_answer", note)
        page = load(client, address)
        assert "exact" not in asked
        if "together" in address:
            options = QueryOptions(k=3, rerank="exact")
            (mean,) = place.open().query([0, 1, 2], (), options, together=True)
            assert find_hits(page) == [hit.row for hit in mean.hits]


def test_typed_texts_and_uploaded_pictures_are_queries(client, index, place):
    page = load(client, "/query?text=abcdef&k=3")
    (answer,) = index.query_examples([place.task.read_query({"text": "abcdef"})], QueryOptions(k=3))
    assert find_hits(page) == [hit.row for hit in answer.hits]
    pairs = [found for found in page.addresses if found.startswith("/pair")]
    assert "text=abcdef" in pairs[0]
    explanation = " ".join(load(client, pairs[0]).texts)
    assert "exact score" in explanation and "input" in explanation
    file = io.BytesIO()
    Image.fromarray(np.zeros((4, 7, 3), np.uint8)).save(file, "PNG")
    form = {"csrf": find_token(load(client, "/query"))}
    sent = client.post("/query/picture", data=form, files={"picture": ("x.png", file.getvalue())})
    assert sent.status_code == 303, sent.text
    (answer,) = index.query_examples([place.task.read_query({"image": Image.new("RGB", (7, 4))})])
    assert find_hits(load(client, sent.headers["location"])) == [hit.row for hit in answer.hits]
    wrong = client.post("/query/picture", data=form, files={"picture": ("x.png", b"<svg onload=alert(1)>")})
    assert client.get(wrong.headers["location"]).status_code == 422
    assert client.get("/query?upload=00").status_code == 404


def find_token(page):
    return page.find("input", name="csrf")[0]["value"]


def find_hidden(page, name, row):
    """Return the value of a field of the form about a row."""
    fields = page.find("input", type="hidden")
    place = next(n for n, field in enumerate(fields) if field["name"] == "row" and field["value"] == str(row))
    return next(field["value"] for field in fields[place:] if field["name"] == name)


def test_a_row_page_holds_its_columns_and_the_queries_that_it_helps(client, index):
    page = load(client, "/rows/5?queries=yes")
    text = " ".join(page.texts)
    assert "train 5" in text and "self-influence" in text
    score_Q = index.score_matrix("query", range(N_QUERIES))[:, 5]
    helped = [int(q) for q in np.argsort(-score_Q)[:10] if score_Q[q] > 0]
    hurt = [int(q) for q in np.argsort(score_Q)[:10] if score_Q[q] < 0]
    found = [int(a["href"].partition("rows=")[2]) for a in page.find("a", **{"class": "id"}) if "/query" in a["href"]]
    assert found == helped + hurt and found
    assert page.find("a", rel="bookmark")[0]["href"] == "/rows/5?queries=yes"
    rank = 1 + [row.row for row in index.self_influence()].index(5)
    assert f"{rank} of {N_TRAIN}" in text
    assert client.get("/rows?row=train/5").headers["location"] == "/rows/5"
    for wrong in ("/rows/40", "/rows/-1", "/rows/x", "/rows?row=", f"/rows/{0:020}1"):
        assert client.get(wrong).status_code == 404


def test_a_pair_page_holds_the_parts_of_the_score(client, index):
    page = load(client, "/pair?row=5&query=2&checkpoints=0")
    explanation = explain(index, 5, 2, checkpoints=[0])
    text = " ".join(page.texts)
    assert format_score(explanation.score) in text
    for layer, part in explanation.by_layer.items():
        assert layer in text and format_score(part) in text
    assert client.get("/pair?row=99&query=0").status_code in (404, 422)


def test_suspects_are_those_of_the_library_and_take_decisions(place):
    with serve(place.location) as client:
        page = load(client, "/suspects")
        suspects = find_mislabelled(place.open())
        rows = [int(a["id"].rpartition("-")[2]) for a in page.find("form", **{"class": "decide"})]
        assert rows == [suspect.row for suspect in suspects[:20]]
        second = load(client, page.find("a", rel="next")[0]["href"])
        assert len(second.find("form", **{"class": "decide"})) == N_TRAIN - 20
        token, first = find_token(page), suspects[0]
        form = {"row": first.row, "verdict": "relabel", "new_label": "9", "back": "/suspects?start=20#s0"}
        assert client.post("/decisions", data=form).status_code == 403
        decisions = Decisions(default_path(place.directory))
        assert decisions.read() == {}
        done = client.post("/decisions", data={**form, "csrf": token})
        assert (done.status_code, done.headers["location"]) == (303, "/suspects?start=20#s0")
        assert [(d.id, d.verdict, d.label, d.new_label) for d in decisions.read().values()] == [
            (first.id, "relabel", str(first.label), "9")
        ]
        shown = Parsed(client.get(f"/rows/{first.row}").text)
        assert shown.find("button", value="relabel")[0]["aria-pressed"] == "true"
        assert json.loads(client.get("/decisions.json").text)[0]["new_label"] == "9"
        assert client.get("/decisions.csv").text.count("\n") == 2
        # A script gets the form alone.
        headers = {"HX-Request": "true"}
        undone = client.post("/decisions", data={**form, "csrf": token, "verdict": ""}, headers=headers)
        assert undone.text.startswith("<form") and decisions.read() == {}
        known = find_hidden(page, "id", first.row)
        assert json.loads(known) == first.id
        assert client.post("/decisions", data={**form, "csrf": token, "id": known}).status_code == 303
        other = find_hidden(page, "id", suspects[1].row)
        assert (
            client.post("/decisions", data={**form, "csrf": token, "id": other, "verdict": "drop"}).status_code == 409
        )
        assert [d.verdict for d in decisions.read().values()] == ["relabel"]
        decisions.forget(first.row)
        for wrong in ({"verdict": "burn"}, {"new_label": ""}):
            assert client.post("/decisions", data={**form, "csrf": token, **wrong}).status_code == 422
        asked = client.post("/decisions", data={**form, "csrf": token, "new_label": ""}, headers=headers)
        assert asked.status_code == 200 and "Type the new label" in asked.text and decisions.read() == {}
        away = client.post("/decisions", data={**form, "csrf": token, "back": "//evil.example/"})
        assert away.headers["location"] == "/"
        decisions.forget(first.row)


def test_a_decision_has_the_label_of_the_ranked_column(place, tmp_path):
    with serve(place.location, Settings(decisions=tmp_path / "decisions.sqlite")) as client:
        for column in ("name", "none"):
            page = load(client, f"/suspects?labels={column}")
            row = int(page.find("form", **{"class": "decide"})[0]["id"].rpartition("-")[2])
            assert page.find("input", name="new_label")
            form = {"row": row, "verdict": "relabel", "new_label": "x", "labels": find_hidden(page, "labels", row)}
            assert client.post("/decisions", data={**form, "csrf": find_token(page)}).status_code == 303
            label = Decisions(tmp_path / "decisions.sqlite").find(row).label
            assert label == (f"train {row}" if column == "name" else "")


def test_two_scores_and_two_indexes_are_compared(place):

    app = create_app(place.location, Settings(), place.location)
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        one, other = (place.open().query([1], (), QueryOptions(k=6, score=score))[0] for score in ("tracin", "cosine"))
        page = load(client, "/compare?rows=1&k=6&other=cosine")
        both = len({hit.row for hit in one.proponents} & {hit.row for hit in other.proponents})
        assert f"{both} of 6 in both" in page.texts
        same = load(client, "/compare?rows=1&k=6&against=index")
        assert sum(text.endswith("6 in both") and text.startswith("6 ") for text in same.texts) == 2


@pytest.mark.parametrize(("change", "got"), [(3, "43 rows"), (0, "40 rows with other contents")])
def test_an_index_of_other_rows_is_not_compared(place, tmp_path, change, got):
    task = replace(
        make_task(tmp_path, [0]), train_data=lambda: [make_row(at + 1, "train") for at in range(40 + change)]
    )
    build(task, tmp_path / "index", CONFIG)
    app = create_app(place.location, Settings(), IndexLocation(tmp_path / "index", task, device="cpu"))
    with TestClient(app, base_url="http://127.0.0.1:8321") as client:
        response = client.get("/compare?rows=0&against=index")
        assert response.status_code == 422 and got in response.text and "the 40 of the first index" in response.text


def test_answers_can_be_saved_for_people_programs_and_the_viewer(client, index):
    (answer,) = index.query([4], (), QueryOptions(k=3))
    assert client.get("/query/answers.csv?rows=4&k=3").text.count("\n") == 1 + len(answer.hits)
    (line,) = client.get("/query/answers.jsonl?rows=4&k=3").text.splitlines()
    assert [hit["row"] for hit in json.loads(line)["opponents"]] == [hit.row for hit in answer.opponents]
    (line,) = client.get("/query/answers.viewer.jsonl?rows=4&k=3").text.splitlines()
    record = json.loads(line)
    assert record["example_id"] == "query query/4" and record["inputs_plaintext"] == "query 4"
    assert record["targets_plaintext"] == "1"
    for kind, hits in (("proponent", answer.proponents), ("opponent", answer.opponents)):
        assert record[f"{kind}s"] == [f"train {hit.row}" for hit in hits]
        assert record[f"{kind}_ids"] == [f"train/{hit.row}" for hit in hits]
        assert record[f"{kind}_scores"] == [hit.score for hit in hits]
    assert client.get("/query/answers.exe?rows=4").status_code == 422


def test_every_figure_is_a_file(client):
    for address, n_figures in (("/", 1), ("/query?rows=0", 3), ("/pair?row=1&query=0", 1), ("/hubs?k=3", 1)):
        figures = [found for found in load(client, address).addresses if found.startswith("/figures/")]
        # Each is shown as SVG, and linked as SVG and PNG.
        assert len(figures) == 3 * n_figures
        for figure in figures[-2:]:
            response = client.get(figure)
            assert response.status_code == 200
            if ".svg" in figure:
                assert response.text.startswith("<svg xmlns=") and "script" not in response.text
                assert "sandbox" in response.headers["content-security-policy"]
            else:
                assert Image.open(io.BytesIO(response.content)).format == "PNG"
    for wrong in ("/figures/query/9.svg?rows=0", "/figures/overview/1.gif", "/figures/none/1.svg"):
        assert client.get(wrong).status_code == 404


def test_a_search_lists_rows_by_words_and_label(client):
    def list_rows(address):
        return [int(a["value"]) for a in load(client, address).find("input", name="rows")]

    assert list_rows("/query") == list(range(N_QUERIES))
    assert list_rows("/query?side=train&label=2&start=20") == [row for row in range(20, N_TRAIN) if row % 3 == 2]
    assert list_rows("/query?side=train&find=train/3+train") == [3, *range(30, 40)]
    assert list_rows("/query?find=nothing") == []
    # Chosen rows are kept while others are searched.
    assert sorted(list_rows("/query?rows=0,5&find=query/1&browse=yes")) == [0, 1, 5, 10, 11]
    assert find_hits(load(client, "/query?rows=0&find=query/1&browse=yes")) == []


def test_ticked_rows_are_kept_while_the_list_is_paged(client):
    def list_rows(page, kind):
        return [int(a["value"]) for a in page.find("input", name="rows", type=kind)]

    def list_buttons(page):
        return [a["value"] for a in page.find("button", name="page")]

    # What a browser sends when two boxes are ticked and "next" is pressed.
    page = load(client, "/query?side=train&rows=0&rows=3&find=&page=24")
    assert list_rows(page, "checkbox") == list(range(24, N_TRAIN)) and list_rows(page, "hidden") == [0, 3]
    assert list_buttons(page) == ["0"] and find_hits(page) == []
    page = load(client, "/query?side=train&rows=30&rows=0&rows=3&find=&page=0")
    assert list_rows(page, "hidden") == [30] and list_buttons(page) == ["24"]
    assert [int(a["value"]) for a in page.find("input", name="rows", type="checkbox") if "checked" in a] == [0, 3]


def test_ticked_rows_are_not_taken_for_rows_of_another_data_set(client):
    page = load(client, "/query?side=query&rows=3&browse=yes")
    (listed,) = [a["value"] for a in page.find("input", name="listed")]
    assert listed == "query"
    # What a browser sends when the data set is changed, and "Search" or "Show influence" is pressed.
    for button in ("&browse=yes", ""):
        page = load(client, f"/query?listed={listed}&side=train&rows=3{button}")
        assert find_hits(page) == []
        assert not any("checked" in a for a in page.find("input", name="rows"))
    assert find_hits(load(client, f"/query?listed={listed}&side=query&rows=3"))


def test_all_suspects_are_paged(place, monkeypatch):
    def read(client):
        page = load(client, "/suspects?start=20")
        rows = [int(a["value"]) for a in page.find("input", name="row", type="hidden")]
        return rows, " ".join(" ".join(page.texts).split())

    monkeypatch.setattr("tracin_ann.serve.pages.suspects._RANKED", 20)
    expected = [suspect.row for suspect in find_mislabelled(place.open())[20:]]
    with serve(place.location) as client:
        rows, text = read(client)
        assert rows == expected and "21 to 40 of 40" in text and "are listed" not in text
    with serve(place.location, Settings(most_records=30)) as client:
        rows, text = read(client)
        assert rows == expected[:10] and "21 to 30 of 30" in text and "The first 30 are listed." in text


def test_the_figure_of_hubs_counts_all_rows(client, index):
    census = find_hubs(index, k=2).census
    page = load(client, "/hubs?k=2")
    (alt,) = [a["alt"] for a in page.find("img") if a["src"].startswith("/figures/hubs/")]
    expected = "; ".join(
        f"{(counts.count_N == 0).sum()} rows are among the {name} of no query, one is among those of {counts.largest}"
        for name, counts in (("proponents", census.proponents), ("opponents", census.opponents))
    )
    assert alt == f"Rows by count: {expected}"
    for counts in (census.proponents, census.opponents):
        assert sum(rows for _, rows in counts.histogram) == N_TRAIN
        assert sum(count * rows for count, rows in counts.histogram) == counts.count_N.sum()


WRONG = """
/query?rows=x /query?rows=0-999 /query?k=0&rows=0 /query?k=101&rows=0 /query?score=<b> /query?rows=99
/query?rows=0&checkpoints=7 /query?rows=0&where=none%3D1 /query?rows=0&score=cosine&rerank=exact
/hubs?k=1000 /duplicates?threshold=x /duplicates?threshold=2 /suspects?labels=nan /compare?rows=0&other=x
"""


@pytest.mark.parametrize("address", WRONG.split())
def test_errors_are_pages_with_four_parts(client, address):
    response = client.get(address)
    assert response.status_code in (404, 422), response.text
    page = Parsed(response.text)
    assert [text for text in page.texts if text in ("got", "expected", "remedy")] == ["got", "expected", "remedy"]
    assert "<b>" not in "".join(re.findall(r"<h1>.*?</h1>", response.text))


def test_permalinks_are_the_same_for_equal_views():
    class Given(dict):
        def getlist(self, key):
            return self.get(key, [])

    form = QueryForm.parse(Given(rows=["3", "0-2", "3"], k=["10"], where=[" a=1 ; b=2"], score=[""], rerank=["exact"]))
    assert form.rows == (3, 0, 1, 2)
    assert form.address() == "/query?rows=3%2C0-2&rerank=exact&where=a%3D1&where=b%3D2"
    assert QueryForm().address() == "/query"
    assert format_ranges(read_ranges(Given(rows=["5,1-3,9"]), "rows")) == "5,1-3,9"
    assert make_address("/x", {"a": None, "b": False, "c": "", "d": 0, "e": True}) == "/x?d=0&e=yes"


def test_the_image_cache_is_bounded():
    images = LinkedImages(budget=4000)
    names = [images.add(np.full((20, 20), level, np.uint8)) for level in range(200)]
    kept = [name for name in names if images.find(name.removeprefix("/images/").removesuffix(".png"))]
    assert 0 < len(kept) < 200 and kept == names[-len(kept) :]
    assert images.add(np.full((20, 20), 199, np.uint8)) == names[-1]
