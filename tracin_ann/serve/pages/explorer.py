"""The pages: what each of them asks of the index, and what it shows.

A method gets what was asked and a reader of one generation of the index, and returns a reply. The index is read in
`reader.run` only; pages are rendered afterwards.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit

from tracin_ann.analysis import RANKINGS, By, Suspects, Suspicion
from tracin_ann.choices import DAMPED_SCORES, SCORES, SideName
from tracin_ann.errors import TracinAnnError, UnknownRowError, UsageError, problem, split_problem
from tracin_ann.index import InfluenceIndex
from tracin_ann.report import (
    Examples,
    Figure,
    QueryView,
    ScoredCheckpoints,
    SuspectView,
    ViewBuilder,
    answer_figures,
    build_suspect_views,
    explain_score,
    find_neighbours,
    format_value,
    has_wide_hits,
    make_norms_figure,
)
from tracin_ann.scoring import Answer, QueryOptions, format_cells, parts_figure
from tracin_ann.serve.attribution_lines import format_lines
from tracin_ann.serve.decisions import VERDICTS, Decision, Decisions
from tracin_ann.serve.jobs import ENDED, Job
from tracin_ann.serve.pages.addresses import QueryForm, format_ranges, make_address, read_choice, read_number, read_text
from tracin_ann.serve.pages.comparison import compare_answers
from tracin_ann.serve.pages.inputs import Inputs
from tracin_ann.serve.pages.listing import RowCard, list_rows, split_pages
from tracin_ann.serve.pages.overview import summarise_index
from tracin_ann.serve.pages.pairs import describe_pair
from tracin_ann.serve.pages.rows import describe_row
from tracin_ann.serve.pages.site import Reply, Site
from tracin_ann.serve.pages.work import ComputeQueryFeatures, ExplainPair
from tracin_ann.serve.problems import find_status
from tracin_ann.serve.service import Reader, Service
from tracin_ann.serve.work import ComputeExactAnswers, FindDuplicates, FindHubs, FindMislabelled, Result, Work
from tracin_ann.store import RowFilter
