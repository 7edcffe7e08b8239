"""Command `hf-sleep serve`. Torch, transformers and FastAPI are imported when it runs."""

import os
import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .settings import ServeSettings

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


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hub id or folder, of a base model or of a sleep checkpoint.")
    ],
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
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    **settings: Any,
) -> None:
    """Serve MODEL with the OpenAI API, and memories that stay on the server.

    Listens at this machine alone unless --host says otherwise. SIGTERM ends it: answers on their way are finished, and
    memories are in the store already.
    """
    from .settings import ServeSettings

    given = tuple(token or os.environ.get(TOKENS, "").split())
    try:
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
        _run(model, revision, served, settings, {"host": host, "port": port, "limit_concurrency": max_connections})
    except (ValueError, OSError, ImportError) as error:
        typer.echo("Error: " + " ".join(str(error).split()), err=True)
        raise typer.Exit(1) from None


def _hosts(host: str, tokens: tuple[str, ...]) -> tuple[str, ...]:
    """Names that are answered; without tokens at this machine alone, its own, so that no web page can reach it."""
    from .settings import LOCAL, LOCAL_NAMES

    return LOCAL_NAMES if host in LOCAL and not tokens else ()


def _run(
    model: str, revision: str | None, served: "ServeSettings", sleep: dict[str, Any], listening: dict[str, Any]
) -> None:
    import uvicorn
    from transformers import AutoTokenizer

    from ..auto import AutoModelForSleepLM
    from .app import create_app
    from .settings import LOCAL

    if listening["host"] not in LOCAL and not served.tokens:
        typer.echo(
            f"Warning: whoever reaches {listening['host']} can use this server and its memories: give it a --token",
            err=True,
        )
    if served.store is None:
        typer.echo("Memories end with the server: --store FOLDER keeps them.", err=True)
    asked = {key: value for key, value in sleep.items() if value is not None}
    loaded = AutoModelForSleepLM.from_pretrained(model, sleep=asked or None, revision=revision)
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    uvicorn.run(create_app(loaded, tokenizer, served), timeout_graceful_shutdown=30, **listening)
