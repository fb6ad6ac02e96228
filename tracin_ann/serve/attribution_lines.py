"""Answers as lines of the JSONL format of the training data attribution viewer of PAIR-code/pretraining-tda.

A line is one query: its text and label, and the texts, ids and scores of its proponents and opponents, the best first.
The viewer reads files from disk, see its README.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence

from tracin_ann.choices import SideName
from tracin_ann.results import Answer, Hit, Record
from tracin_ann.text import escape_json

RowText = Callable[[SideName, int], str]


def format_lines(answers: Sequence[Answer], query_set: str, text_of: RowText, label_of: RowText) -> Iterator[str]:
    """Yield the lines of answers, each with its end of line.

    Args:
        answers: the answers.
        query_set: a name for the queries.
        text_of: (side, position) -> text of a row; the viewer highlights equal words of query and hits.
        label_of: (side, position) -> label of a row, or "".
    """
    for answer in answers:
        rows = [(answer.side, row) for row in answer.members]
        record: Record = {
            # The viewer expects a string.
            "example_id": f"{answer.side} {answer.query}",
            "query_set": query_set,
            "inputs_plaintext": "\n".join(text_of(*row) for row in rows),
            "targets_plaintext": ", ".join(dict.fromkeys(label for row in rows if (label := label_of(*row)))),
            **_list_hits("proponent", answer.proponents, text_of),
            **_list_hits("opponent", answer.opponents, text_of),
        }
        yield escape_json(json.dumps(record, ensure_ascii=False)) + "\n"


def _list_hits(kind: str, hits: Sequence[Hit], text_of: RowText) -> Record:
    return {
        f"{kind}s": [text_of("train", hit.row) for hit in hits],
        f"{kind}_ids": [str(hit.id) for hit in hits],
        f"{kind}_scores": [hit.score for hit in hits],
    }
