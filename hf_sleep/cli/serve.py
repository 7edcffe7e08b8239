"""`hf-sleep serve`: OpenAI's interface, with memories that stay on the server."""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import app, errors_in_a_line, say
from .loading import load_model
from .options import Model, with_model

if TYPE_CHECKING:
    from ..serve.settings import ServeSettings

TOKENS = "HF_SLEEP_TOKENS"
UNITS = {"": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(value: str | int) -> int:
    """A number of bytes: `200MB`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(|kB|MB|GB|TB)", str(value))
    if found is None:
        raise typer.BadParameter(f"{value!r} is no number of bytes, such as 200MB or 4GB")
    return int(float(found[1]) * UNITS[found[2]])


def _size(help: str) -> Any:
    return typer.Option(parser=_bytes, metavar="BYTES", help=help)


@app.command()
@with_model
def serve(
    model: Model,
    *,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests. By default MODEL's last part.")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Folder or fsspec URL where memories are written after every change.")
    ] = None,
    token: Annotated[
        list[str] | None, typer.Option(help=f"Bearer token that requests need; repeat it. Or set {TOKENS}.")
    ] = None,
    max_ram: Annotated[Any, _size("Of all memories in RAM.")] = "4GB",
    max_memories: Annotated[int, typer.Option(help="Of each token.")] = 1000,
    ttl: Annotated[float | None, typer.Option(help="Seconds without use after which a memory is forgotten.")] = None,
    max_body: Annotated[Any, _size("Of a request.")] = "4MB",
    max_upload: Annotated[Any, _size("Of a memory that is uploaded.")] = "256MB",
    max_tokens: Annotated[int, typer.Option(help="Of an answer.")] = 1024,
    max_queue: Annotated[int, typer.Option(help="Requests that wait for the model.")] = 64,
    max_connections: Annotated[int, typer.Option(help="Open at once.")] = 512,
    prefixes: Annotated[Any, _size("Of windows kept in the store, so that no beginning is read twice; 0: none.")] = "0",
    **how: Any,
) -> None:
    """Serve MODEL with the OpenAI API, and memories that stay on the server.

    Listens at this machine alone unless --host says otherwise. SIGTERM ends it: answers on their way are finished, and
    memories are in the store already.
    """
    from ..serve.settings import ServeSettings

    given = tuple(token or os.environ.get(TOKENS, "").split())
    with errors_in_a_line():
        served = ServeSettings(
            name=name or model.rstrip("/").rsplit("/", 1)[-1],
            store=store,
            tokens=given,
            hosts=_hosts(host, given),
            max_ram_bytes=max_ram,
            max_memories=max_memories,
            ttl=ttl,
            max_body_bytes=max_body,
            max_upload_bytes=max_upload,
            max_tokens=max_tokens,
            max_queue=max_queue,
            prefix_bytes=prefixes,
        )
        _run(model, how, served, {"host": host, "port": port, "limit_concurrency": max_connections})


def _hosts(host: str, tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Names that are answered; without tokens at this machine alone, its own, so that no web page can reach it."""
    from ..serve.settings import LOCAL, LOCAL_NAMES

    return LOCAL_NAMES if host in LOCAL and not tokens else ()


def _run(model: str, how: dict[str, Any], served: "ServeSettings", listening: dict[str, Any]) -> None:
    import uvicorn

    from ..serve.app import create_app
    from ..serve.settings import LOCAL

    if listening["host"] not in LOCAL and not served.tokens:
        say(f"Warning: whoever reaches {listening['host']} can use this server and its memories: give it a --token")
    if served.store is None:
        say("Memories end with the server: --store FOLDER keeps them.")
    uvicorn.run(create_app(*load_model(model, how), served), timeout_graceful_shutdown=30, **listening)
