#!/usr/bin/env python3
"""Build an influence index from a task: `python build_index.py --task FILE.py:NAME --out DIR` (also `tracin-build`)."""

from tracin_ann.cli.build import main

if __name__ == "__main__":
    main()
