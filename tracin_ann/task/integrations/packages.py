"""Optional packages of the integrations, imported at first use; a missing one is an error that names the extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tracin_ann.errors import MissingPackageError, problem


def import_transformers() -> Any:
    """Return the package `transformers`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import transformers  # noqa: PLC0415 - optional package, imported only here
    except ModuleNotFoundError as error:
        raise _missing("transformers", "transformers") from error
    return transformers


def import_transformers_module(name: str) -> Any:
    """Return a module of `transformers`, such as "models.auto.modeling_auto".

    Raises:
        MissingPackageError: transformers is not installed.
    """
    import_transformers()
    return import_module(f"transformers.{name}")


def import_datasets() -> Any:
    """Return the package `datasets`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import datasets  # noqa: PLC0415 - optional package, imported only here
    except ModuleNotFoundError as error:
        raise _missing("datasets", "datasets") from error
    return datasets


def import_parquet() -> Any:
    """Return the module `pyarrow.parquet`.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    try:
        return import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", "tables") from error


def _missing(package: str, extra: str) -> MissingPackageError:
    return MissingPackageError(
        problem(
            f"{package} is not installed",
            got="no module of this name",
            expected=f"the extra {extra!r}",
            remedy=f"run `pip install 'tracin-ann[{extra}]'`",
        )
    )
