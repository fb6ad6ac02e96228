"""tracin-serve: the explorer of an index in a browser, and its JSON API."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path

import click

from tracin_ann.cli.command import command, complete_files, directory_argument
from tracin_ann.cli.imports import pause_collector
from tracin_ann.cli.index_options import choose_workers, index_options, worker_options
from tracin_ann.cli.messages import print_note
from tracin_ann.cli.parameters import TOKEN_VARIABLE, parse_arguments
from tracin_ann.cli.server_client import is_loopback
from tracin_ann.errors import UsageError, problem
from tracin_ann.packages import make_missing_package_error

_SHORTEST_TOKEN = 16
_LONGEST_HEAD = 256 << 10
"""Bytes of the address and the headers of a request."""


@command(
    "tracin-serve runs/mnist",
    "tracin-serve runs/mnist --port 9000 --decisions review.sqlite",
    "TRACIN_SERVE_TOKEN=$(openssl rand -hex 16) tracin-serve runs/mnist --host 0.0.0.0",
)
@directory_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8321, show_default=True, type=click.IntRange(0, 65535), help="Port; 0 takes a free one."
)
@click.option(
    "--token",
    envvar=TOKEN_VARIABLE,
    show_envvar=True,
    help="What clients have to present; required for a --host that is not a loopback address.",
)
@click.option(
    "--decisions",
    type=click.Path(dir_okay=False),
    shell_complete=complete_files,
    help="SQLite file with the decisions about suspects.  [default: DIR.decisions.sqlite]",
)
@click.option(
    "--against",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Another index of the same training rows; pages compare its answers with those of the first.",
)
@worker_options
@index_options
def main(  # noqa: PLR0913
    directory: str,
    host: str,
    port: int,
    token: str | None,
    decisions: str | None,
    against: str | None,
    **options: object,
) -> None:
    """Serve pages and a JSON API over the index in DIR until interrupted.

    Only programs on this machine can connect, unless --host names another address; then clients need the token. An
    index that is built again or appended to is picked up without a restart.
    """
    with pause_collector():
        try:
            import uvicorn

            from tracin_ann.serve import IndexLocation, Settings, create_app
        except ImportError as error:
            raise make_missing_package_error("FastAPI", error.name or "fastapi", "the pages", "serve") from error

    is_local = is_loopback(host)
    _check_token(token, host, is_local=is_local)
    launcher, shard_options = choose_workers(options)
    location = IndexLocation(
        Path(directory),
        options["task"],
        parse_arguments(options["task_args"]) or ({} if options["task"] else None),  # type: ignore[arg-type]
        device=options["device"],  # type: ignore[arg-type]
        batch_size=options["batch_size"],  # type: ignore[arg-type]
        memory_bytes=options["memory_bytes"],  # type: ignore[arg-type]
        launcher=launcher,
        shard_options=shard_options,
    )
    settings = Settings(
        token=token,
        # With a token, another name of the server, such as that of a proxy, is no way around it.
        hosts=Settings.hosts | {host} if token is None and Settings.hosts else None,
        decisions=None if decisions is None else Path(decisions),
    )
    with listen(host, port) as listener:
        other = None if against is None else replace(location, directory=Path(against))
        app = create_app(location, settings, other)
        print_note(f"serving {directory} at {_make_address(listener)}; press Ctrl+C to stop", err=True)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            ws="none",
            # The address of a view has the text of the query.
            h11_max_incomplete_event_size=_LONGEST_HEAD,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run(sockets=[listener])


def _check_token(token: str | None, host: str, *, is_local: bool) -> None:
    """Check that clients from other machines need a token that cannot be guessed.

    Raises:
        UsageError: there is no token, or a short one.
    """
    if token is None and not is_local:
        expected, remedy = "--token, or a loopback address", "add --token, or leave out --host"
        raise UsageError(
            problem("other machines could connect without a token", got=host, expected=expected, remedy=remedy)
        )
    if token is not None and (len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable()):
        expected = f"{_SHORTEST_TOKEN} or more printable ASCII characters"
        remedy = "make a random one, such as with openssl rand -hex 16"
        raise UsageError(problem("bad --token", got=f"{len(token)} characters", expected=expected, remedy=remedy))


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        UsageError: the address is not one of this machine, or the port is in use.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
        # Connections inherit it. asyncio sets it only for sockets that it makes; without it, a body waits up to 40 ms
        # until the client has acknowledged the headers.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except OSError as error:
        expected, remedy = "a free port of an address of this machine", "change --port or --host"
        got = error.strerror or str(error)
        raise UsageError(
            problem(f"cannot listen on {host}, port {port}", got=got, expected=expected, remedy=remedy)
        ) from error


def _make_address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
