"""Imports of packages: large ones without garbage collection, optional ones with an error that names the extra."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from tracin_ann.errors import MissingPackageError, problem


@contextmanager
def postpone_collection() -> Iterator[None]:
    """Run the block without garbage collection, which would examine all objects of the imported packages each time.

    If the process has frozen objects, as commands do, those of the block are frozen, too: later collections, also those
    at exit, ignore them.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def import_pyarrow(purpose: str = "frames and Parquet") -> tuple[Any, Any]:
    """Return the modules `pyarrow` and `pyarrow.parquet`.

    Args:
        purpose: what needs them, in the plural, for the message.

    Raises:
        MissingPackageError: pyarrow is not installed.
    """
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise make_missing_package_error("pyarrow", "pyarrow", purpose, "tables") from error
    return pyarrow, parquet


def import_pillow(purpose: str, module: str = "Image") -> Any:
    """Return the module `PIL.Image`, or another one of `PIL`.

    Args:
        purpose: what needs it, in the plural, for the message.
        module: its name.

    Raises:
        MissingPackageError: Pillow is not installed.
    """
    try:
        return import_module(f"PIL.{module}")
    except ImportError as error:
        raise make_missing_package_error("Pillow", "PIL", purpose, "report") from error


def make_missing_package_error(package: str, module: str, purpose: str, extra: str) -> MissingPackageError:
    """Return the error for a package that is not installed.

    Args:
        package: its name.
        module: the module that cannot be imported.
        purpose: what needs it, in the plural.
        extra: the extra of tracin-ann that installs it.
    """
    return MissingPackageError(
        problem(
            f"{package} is not installed",
            got=f"no module {module}",
            expected=f"{package}, which {purpose} need",
            remedy=f"pip install 'tracin-ann[{extra}]'",
        )
    )


def import_transformers(module: str = "") -> Any:
    """Return the package `transformers`, or a module of it such as "models.auto.modeling_auto".

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import transformers  # noqa: PLC0415
    except ImportError as error:
        raise make_missing_package_error(
            "transformers", "transformers", "runs of the Trainer", "transformers"
        ) from error
    return import_module(f"transformers.{module}") if module else transformers


def import_datasets() -> Any:
    """Return the package `datasets`.

    Raises:
        MissingPackageError: it is not installed.
    """
    try:
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise make_missing_package_error("datasets", "datasets", "folders of save_to_disk", "datasets") from error
    return datasets


def import_scipy_stats() -> Any:
    """Return the module `scipy.stats`.

    Raises:
        MissingPackageError: SciPy is not installed.
    """
    try:
        from scipy import stats  # noqa: PLC0415
    except ImportError as error:
        raise make_missing_package_error("SciPy", "scipy", "rank correlations", "evaluation") from error
    return stats
