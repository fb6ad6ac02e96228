"""Benchmarks of tracin_ann; `python -m benchmarks` lists them."""
