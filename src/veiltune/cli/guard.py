"""The commands of the guarded API: `guard serve` and `guard key`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veiltune.errors import InputError

guard_app = typer.Typer(no_args_is_help=True, help="A black-box API that protects what it was trained on.")

_EXTRA = "pip install '.[guard]' in a checkout of veiltune"


@guard_app.command()
def serve(
    model: Annotated[str, typer.Argument(help="Folder of a finished run, a model folder, smollm2 or a hub name.")],
    guard: Annotated[Path | None, typer.Option(help="TOML file: what to protect, limits, keys, address.")] = None,
    address: Annotated[str, typer.Option(help="host:port; overrides the file.")] = "",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. limits.budget=1000. Repeatable."),
    ] = None,
    insecure_no_keys: Annotated[
        bool, typer.Option("--insecure-no-keys", help="Let anyone who reaches the address ask.")
    ] = False,
    ready_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve a model as a black box, with the guard in between, until Ctrl-C.

    POST /v1/next-token and /v1/completions (as OpenAI's), GET /v1/models, /healthz, /metrics, /openapi.json, and a page
    to try it at /. Running answers are finished before it stops.
    """
    import logging
    import os
    import sys

    from veiltune.config import load_config, parse_config
    from veiltune.config.guard import GuardConfig

    chosen = [*(overrides or []), *([f'address="{address}"'] if address else [])]
    if guard is not None:
        config = load_config(GuardConfig, guard, chosen)
    elif chosen:
        config = load_config(GuardConfig, os.devnull, chosen)
    else:
        config = parse_config(GuardConfig, {})
    try:
        from veiltune.guard.serving import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise InputError(f"veiltune guard serve needs {error.name}; {_EXTRA}") from None
    from veiltune.models.loading import quiet_libraries

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("veiltune").setLevel(logging.INFO)
    quiet_libraries()
    run(model, config, without_keys=insecure_no_keys, ready_file=ready_file)


@guard_app.command()
def key(
    name: Annotated[str, typer.Option(help="Whose key: lower-case letters, digits and hyphens.")],
    file: Annotated[Path, typer.Option("--file", help="File of hashes that guard.toml names as keys.")] = Path(
        "guard-keys.jsonl"
    ),
) -> None:
    """Make an API key, print it once, and keep only its hash."""
    from veiltune.guard.keys import new_key

    typer.echo(new_key(file, name))
