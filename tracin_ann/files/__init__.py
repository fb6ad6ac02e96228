"""Files on disk: written durably and as a whole, opened safely, and read as JSON records."""

from __future__ import annotations

from tracin_ann.files.durable import (
    atomic_path,
    atomic_write,
    difference,
    file_digest,
    hdf5_file,
    is_temporary,
    make_directory,
    mapped_array,
    own_dataset,
    own_object,
    read_array,
    read_json,
    read_npz,
    save_array,
    sweep_temporaries,
    sync_directory,
    write_json_atomic,
)
from tracin_ann.files.json_records import read_record
from tracin_ann.files.opening import (
    NotPlainError,
    open_descriptor,
    open_directory,
    open_plain,
    reading,
    require_regular,
)
from tracin_ann.files.user_files import output_file, read_given_text

__all__ = [
    "NotPlainError",
    "atomic_path",
    "atomic_write",
    "difference",
    "file_digest",
    "hdf5_file",
    "is_temporary",
    "make_directory",
    "mapped_array",
    "open_descriptor",
    "open_directory",
    "open_plain",
    "output_file",
    "own_dataset",
    "own_object",
    "read_array",
    "read_given_text",
    "read_json",
    "read_npz",
    "read_record",
    "reading",
    "require_regular",
    "save_array",
    "sweep_temporaries",
    "sync_directory",
    "write_json_atomic",
]
