#!/usr/bin/env python3
"""Query an influence index for proponents and opponents: `python query.py DIR --ids 0-9` (also `tracin-query`)."""

from tracin_ann.cli.query import main

if __name__ == "__main__":
    main()
