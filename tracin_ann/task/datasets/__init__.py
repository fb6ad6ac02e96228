"""Data sets in common formats as map-style data sets: records of files, pictures, tar shards, rows of a stream."""
