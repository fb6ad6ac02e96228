"""Files on disk: atomic durable writes, safe opening, digests, and the JSON, NumPy and HDF5 formats."""

from __future__ import annotations

from tracin_ann.files.arrays import map_array, read_array, read_npz, save_array
from tracin_ann.files.digests import describe_difference, file_digest
from tracin_ann.files.durable import (
    atomic_path,
    atomic_write,
    is_temporary,
    make_directory,
    remove_temporaries,
    sync_directory,
)
from tracin_ann.files.hdf5 import (
    locate_own_dataset,
    open_own_dataset,
    open_own_group,
    read_attribute,
    read_dataset,
    write_hdf5,
)
from tracin_ann.files.json_records import read_json, read_record, write_json_atomic
from tracin_ann.files.mapping import AddressRange, map_file, share_memory
from tracin_ann.files.opening import (
    NotRegularFileError,
    open_descriptor,
    open_directory,
    open_regular,
    report_damage,
    require_regular,
)
from tracin_ann.files.user_files import open_output, read_user_text

__all__ = [
    "AddressRange",
    "NotRegularFileError",
    "atomic_path",
    "atomic_write",
    "describe_difference",
    "file_digest",
    "is_temporary",
    "locate_own_dataset",
    "make_directory",
    "map_array",
    "map_file",
    "open_descriptor",
    "open_directory",
    "open_output",
    "open_own_dataset",
    "open_own_group",
    "open_regular",
    "read_array",
    "read_attribute",
    "read_dataset",
    "read_json",
    "read_npz",
    "read_record",
    "read_user_text",
    "remove_temporaries",
    "report_damage",
    "require_regular",
    "save_array",
    "share_memory",
    "sync_directory",
    "write_hdf5",
    "write_json_atomic",
]
