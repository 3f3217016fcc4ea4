"""The `veiltune` command: parse, call one function, print, exit code.

Exit codes: 0 done, 2 bad input, 3 privacy plan infeasible, 4 vendor or API refused or unreachable, 5 more privacy was
claimed than an audit allows, 6 disk full or not writable, 7 a gate of `--fail-if` failed, 130 stopped by Ctrl-C (the
run resumes). Errors are one line on standard error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from veiltune.cli import data, forget, guard, measure
from veiltune.errors import VeiltuneError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 2 bad input, 3 privacy plan infeasible, 4 vendor away or refusing, 5 audited epsilon"
    " above the claimed one, 6 disk, 7 a gate failed, 130 stopped",
)
vendor_app = typer.Typer(no_args_is_help=True, help="The vendor's side: certificates and the server.")
tenant_app = typer.Typer(no_args_is_help=True, help="Who may connect.")
app.add_typer(vendor_app, name="vendor")
app.add_typer(data.data_app, name="data")
app.add_typer(guard.guard_app, name="guard")
vendor_app.add_typer(tenant_app, name="tenant")

State = Annotated[Path, typer.Option("--state", help="The vendor's folder: authority, job database, checkpoints.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one value, e.g. train.epochs=5. Repeatable."),
]

# Large frames are taken from and given back to the system at every call unless malloc is told to keep them, and a
# thread that spins for long while it waits takes the core that the other party's process needs.
_PROCESS_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "4",
    "MALLOC_MMAP_THRESHOLD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "1073741824",
    "MALLOC_TOP_PAD_": "67108864",
    "GOMP_SPINCOUNT": "10000",
    "GRPC_VERBOSITY": "NONE",
    "TOKENIZERS_PARALLELISM": "false",
}


def _print_version(wanted: bool) -> None:
    if wanted:
        from veiltune import __version__

        typer.echo(f"veiltune {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Fine-tune a vendor's language model on text that stays here, and see what leaks."""


@app.command()
def tune(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be released and trained; send nothing.")
    ] = False,
    no_baseline: Annotated[
        bool, typer.Option("--no-baseline", help="Do not train the customer-alone head to compare with.")
    ] = False,
) -> None:
    """Fine-tune the vendor's model on text that the vendor never sees, and write one run folder.

    The same command over the same run folder goes on where the last one stopped.
    """
    from veiltune.config import TuneConfig, load_config
    from veiltune.terminal import TerminalReporter, print_plan, print_summary, stop_on_interrupt

    chosen = [*(overrides or []), *(["train.customer_alone=false"] if no_baseline else [])]
    settings = load_config(TuneConfig, config, chosen)
    if dry_run:
        from veiltune.customer.planning import plan

        print_plan(plan(settings))
        return
    from veiltune.customer.session import tune as run_tune

    with stop_on_interrupt() as stop, TerminalReporter() as reporter:
        summary = run_tune(settings, reporter=reporter, stop=stop)
    print_summary(summary, Path(settings.run))


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="TOML file of the run.")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole claim and what it leaves out; train nothing.")
    ] = False,
) -> None:
    """Fine-tune a model of your own with differential privacy, and write one run folder.

    The same command over the same run folder goes on where the last one stopped, to the same result and epsilon.
    """
    from veiltune.config import TrainConfig, load_config
    from veiltune.terminal import TerminalReporter, print_plan, print_training, stop_on_interrupt

    settings = load_config(TrainConfig, config, overrides or [])
    if dry_run:
        from veiltune.dp.planning import dry_run as describe

        print_plan(describe(settings))
        return
    from veiltune.dp.session import train as run_train
    from veiltune.models.loading import quiet_libraries

    quiet_libraries()
    with stop_on_interrupt() as stop, TerminalReporter() as reporter:
        summary = run_train(settings, reporter=reporter, stop=stop)
    if summary:  # the other processes of torchrun have none
        print_training(summary, Path(settings.run))


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run.")],
    source: Annotated[str, typer.Argument(help="Table of texts: CSV, TSV, JSONL, Parquet or hub:NAME:SPLIT.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="CSV to write; must not exist.")],
    text_column: Annotated[str | None, typer.Option(help="Column of the texts; the run's own if not given.")] = None,
) -> None:
    """Predict labels of new texts through a finished run.

    A `veiltune train` predicts on this machine; a `veiltune tune` through the vendor, under its mechanism and ledger.
    """
    from veiltune.runs import RunFolder
    from veiltune.terminal import TerminalReporter

    if RunFolder(run).kind == "train":
        from veiltune.dp.prediction import predict_classes
        from veiltune.models.loading import quiet_libraries

        quiet_libraries()
        typer.echo(f"{predict_classes(run, source, output, text_column=text_column)} predictions in {output}")
        return
    from veiltune.customer.prediction import predict as run_predict

    with TerminalReporter() as reporter:
        count = run_predict(run, source, output, text_column=text_column, reporter=reporter)
    typer.echo(f"{count} predictions in {output}; {run / 'privacy.json'} counts their releases")


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="Folder of a finished `veiltune train`.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
) -> None:
    """Write a finished run as a plain Hugging Face checkpoint: from_pretrained reads it, without Veiltune."""
    from veiltune.models.finished import merge_run
    from veiltune.models.loading import quiet_libraries

    quiet_libraries()
    merge_run(run, output)
    typer.echo(f"the model and its tokenizer: {output}")


app.command()(forget.unlearn)
app.command()(measure.audit)
app.command()(measure.report)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--folder", help="Where the demo writes; a new folder each time if not given.")
    ] = Path("runs"),
    seed: Annotated[int, typer.Option(help="Seed of the synthetic tickets and of training; never of the noise.")] = 0,
) -> None:
    """Both parties on this machine: synthetic support tickets, MiniLM, mTLS, d_chi, then the audit and the report."""
    from veiltune.demo import run_demo
    from veiltune.terminal import print_demo

    print_demo(run_demo(folder, seed=seed, say=typer.echo))


@app.command()
def models() -> None:
    """List models that are known to fit; any other of the same families works too."""
    from veiltune.models.catalog import MODELS
    from veiltune.terminal import print_models

    print_models(MODELS)


@vendor_app.command("init")
def vendor_init(
    state: State = Path("vendor-state"),
    model: Annotated[str, typer.Option(help="Base model: minilm, a local folder or a hub name.")] = "minilm",
    address: Annotated[str, typer.Option(help="host:port to listen on.")] = "127.0.0.1:50051",
    host: Annotated[
        list[str] | None, typer.Option(help="Names under which customers reach the server. Repeatable.")
    ] = None,
) -> None:
    """Make the vendor's folder: a certificate authority, the server's certificate and vendor.toml."""
    from veiltune.config import VendorConfig, dump_toml, parse_config
    from veiltune.runs import atomic_write_bytes
    from veiltune.vendor.pki import create_authority, issue_server, server_names

    hosts = host or ["localhost", "127.0.0.1"]
    server_names(hosts)  # refused before anything is written
    config = parse_config(VendorConfig, {"model": model, "address": address, "state": str(state)})
    create_authority(state)
    issue_server(state, hosts)
    atomic_write_bytes(state / "vendor.toml", dump_toml(config).encode())
    typer.echo(f"{state} is ready: add a customer with `veiltune vendor tenant add NAME --state {state}`,")
    typer.echo(f"then start with `veiltune vendor serve {state / 'vendor.toml'}`")


@tenant_app.command("add")
def tenant_add(
    name: Annotated[str, typer.Argument(help="Lower-case letters, digits and hyphens.")],
    state: State = Path("vendor-state"),
    days: Annotated[int, typer.Option(help="Days until the certificate expires.")] = 90,
) -> None:
    """Issue a customer's certificate; hand the folder over by a safe way, then delete it here."""
    from veiltune.vendor.pki import issue_tenant

    enrolment = issue_tenant(state, name, valid_days=days)
    typer.echo(f"hand {enrolment} to {name}; its tune.toml names it as vendor.credentials")


@vendor_app.command("serve")
def vendor_serve(
    config: Annotated[Path, typer.Argument(help="vendor.toml, as `veiltune vendor init` wrote it.")],
    overrides: Overrides = None,
    ready_file: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Serve the model to enrolled customers until Ctrl-C."""
    import asyncio
    import logging

    from veiltune.config import VendorConfig, load_config
    from veiltune.models.loading import quiet_libraries
    from veiltune.vendor.server import serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", stream=sys.stderr)
    logging.getLogger("veiltune").setLevel(logging.INFO)
    logging.getLogger("grpc").setLevel(logging.CRITICAL)  # its traceback for a malformed frame says no more than ours
    quiet_libraries()
    asyncio.run(serve(load_config(VendorConfig, config, overrides or []), ready_file=ready_file))


_INTERRUPTED = 130


def main() -> None:
    """The entry point: one line for every refusal, and the exit code of its kind."""
    _settle_environment()
    try:
        code = app(standalone_mode=False)  # what typer makes of Ctrl-C and --help it returns; a command returns None
    except VeiltuneError as error:
        sys.exit(_refuse(error, error.exit_code))
    except Exception as error:
        sys.exit(_unexpected(error))
    if code == _INTERRUPTED:
        _refuse("stopped; the same command goes on from what is kept", code)
    sys.exit(code)


def _unexpected(error: Exception) -> int:
    """A click usage error is the user's; anything else is a defect of ours and keeps its traceback for the report."""
    if isinstance(error, TyperException):
        return _refuse(error.format_message(), 2)
    raise error


def _refuse(message: object, code: int) -> int:
    if str(message):  # empty where the help was printed instead
        print(f"veiltune: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _settle_environment() -> None:
    """Starts the process again with the environment that malloc and OpenMP read only at start; once."""
    missing = {name: value for name, value in _PROCESS_ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.argv[0] and Path(sys.argv[0]).exists() and "VEILTUNE_SETTLED" not in os.environ:
        environment = os.environ | missing | {"VEILTUNE_SETTLED": "1"}
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
