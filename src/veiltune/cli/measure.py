"""The commands that measure what leaks: `audit` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from veiltune.errors import InputError

SPLIT, MODEL = "A split run (with --public)", "A language model (with --manifest, or --data and --pii)"
_CLAIM_BROKEN, _GATE_FAILED = 5, 7


def _split(text: str, *names: str) -> typer.models.OptionInfo:
    return typer.Option(*names, help=text, rich_help_panel=SPLIT)  # type: ignore[no-any-return]  # typer says Any


def _model(text: str, *names: str) -> typer.models.OptionInfo:
    return typer.Option(*names, help=text, rich_help_panel=MODEL)  # type: ignore[no-any-return]  # typer says Any


def _refuse_options_of(panel: str, context: typer.Context) -> None:
    """Options of the other kind of audit would do nothing, a gate among them."""
    of_panel = [one for one in context.command.params if getattr(one, "rich_help_panel", None) == panel]
    sources = [context.get_parameter_source(one.name or "") for one in of_panel]
    given = [one.opts[0] for one, at in zip(of_panel, sources, strict=True) if at and at.name == "COMMANDLINE"]
    if given:
        raise InputError(
            f"{', '.join(given)}: only for {panel[0].lower()}{panel[1:]}; leave out what is not for this run"
        )


def audit(
    context: typer.Context,
    run: Annotated[
        str, typer.Argument(help="Folder of a finished run; or a model folder, a hub name or an API's address.")
    ],
    preset: Annotated[
        str, typer.Option(help="Split run: quick, standard (default), full. Language model: ci, std (default), full.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the sample and the attackers' training; never of noise.")] = 0,
    public: Annotated[
        str, _split("Public text to train attackers on: a .txt, a text a line, or a table.", "--public")
    ] = "",
    public_column: Annotated[str, _split("Column of the texts, if --public is a table.")] = "text",
    attribute: Annotated[str, _split("Column of the training table with a sensitive attribute to infer.")] = "",
    person: Annotated[str, _split("Column that tells persons apart; without it, texts are split.")] = "",
    personal_terms: Annotated[str, _split("File of names and other personal terms, one a line, to count apart.")] = "",
    manifest: Annotated[Path | None, _model("Manifest of the corpus, as `veiltune data synth` wrote it.")] = None,
    data: Annotated[Path | None, _model("Folder with the training text, where there is no manifest.")] = None,
    pii: Annotated[
        Path | None,
        _model("Table of its secrets: type, value; also person, and member (0: a control).", "--pii"),
    ] = None,
    only: Annotated[Path | None, _model("Judge these persons alone: a file with an id on each line.")] = None,
    leave_out: Annotated[Path | None, _model("Judge all but these persons, e.g. those that were unlearned.")] = None,
    guard: Annotated[
        Path | None, _model("Put this guard.toml's guard before a local model, as `veiltune guard serve` would.")
    ] = None,
    base: Annotated[str, _model("Public model that training started from; a run folder knows its own.")] = "",
    output: Annotated[
        Path | None, _model("Folder for leakage.json; a run folder has a place for it.", "--output", "-o")
    ] = None,
    fail_if: Annotated[
        list[str] | None, _model("Gate, e.g. 'excess_recall_upper > 0.01': exit code 7 if true. Repeatable.")
    ] = None,
    claimed_epsilon: Annotated[float | None, _model("What is claimed, where no run folder says so.")] = None,
    delta: Annotated[float | None, _model("Of that claim; 1e-5 if not given.")] = None,
    tokenizer: Annotated[str, _model("Run or model folder with the tokenizer of an API's model.")] = "",
    api_model: Annotated[str, _model("Name of the model at an API.")] = "",
    key_variable: Annotated[str, _model("Environment variable that holds the API's key.")] = "",
    device: Annotated[str, _model("Where a local model computes: cpu, cuda or cuda:N.")] = "cpu",
    bf16: Annotated[bool, _model("Compute a local model's matrix products in bfloat16.", "--bf16")] = False,
) -> None:
    """Attack a finished run or a language model with every attack there is, and write down what leaks.

    Of a split run: what the vendor could read (attacks.json). Of a language model: what someone who queries it could
    find out of its training text (leakage.json). The same command goes on where an interrupted one stopped.
    """
    if not public:
        if not (manifest or data or pii):
            raise InputError(
                "name what to look for: --public TEXT for a split run; --manifest FILE, or --data DIR and --pii FILE,"
                " for a language model"
            )
        _refuse_options_of(SPLIT, context)
        from veiltune.audit.lm.options import LeakageOptions

        _audit_model(
            LeakageOptions(
                model=run,
                manifest=manifest,
                data=data,
                pii=pii,
                only=only,
                leave_out=leave_out,
                guard=guard,
                base=base,
                tokenizer=tokenizer,
                api_model=api_model,
                key_variable=key_variable,
                output=output,
                preset=preset or "std",
                claimed_epsilon=claimed_epsilon,
                delta=delta,
                device=device,
                bf16=bf16,
                seed=seed,
            ),
            fail_if or [],
        )
        return
    if manifest or data or pii:
        raise InputError("--public audits a split run, --manifest and --data a language model; give one of them")
    _refuse_options_of(MODEL, context)
    from veiltune.audit.options import AuditOptions
    from veiltune.audit.split import audit_run
    from veiltune.terminal import TerminalReporter
    from veiltune.terminal_audit import print_audit

    options = AuditOptions(
        public=public,
        preset=preset or "standard",
        public_column=public_column,
        attribute=attribute,
        person=person,
        personal_terms=personal_terms,
        seed=seed,
    )
    with TerminalReporter() as reporter:
        record = audit_run(Path(run), options, reporter=reporter)
    print_audit(record, Path(run))


def _audit_model(options: object, fail_if: list[str]) -> None:
    from veiltune.audit.lm.gates import Gate, failures
    from veiltune.audit.lm.options import LeakageOptions
    from veiltune.audit.lm.session import audit_model
    from veiltune.models.loading import quiet_libraries
    from veiltune.terminal import TerminalReporter
    from veiltune.terminal_leakage import print_leakage

    assert isinstance(options, LeakageOptions)
    gates = [Gate.parse(text) for text in fail_if]
    quiet_libraries()
    with TerminalReporter() as reporter:
        record = audit_model(options, gates=gates, reporter=reporter)
    print_leakage(record, options.output or Path(options.model))
    bound = record.audited_epsilon
    if bound is not None and bound.exceeds_claim:
        typer.echo(
            f"veiltune: audited epsilon {bound.epsilon:.3g} (at {bound.confidence:.0%} confidence) is above the claimed"
            f" {bound.claimed_epsilon:.3g}: the implementation or the claim is wrong",
            err=True,
        )
        raise typer.Exit(_CLAIM_BROKEN)
    failed = failures(gates, record)
    for line in failed:
        typer.echo(f"veiltune: gate failed: {line}", err=True)
    if failed:
        raise typer.Exit(_GATE_FAILED)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of audited runs.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file to write.")] = Path("report.html"),
    without_text: Annotated[
        bool, typer.Option("--without-text", help="Leave out the sample texts, so that the page can be passed on.")
    ] = False,
) -> None:
    """One page of what was claimed, what was measured and what it means; it opens without a network."""
    from veiltune.report.page import write_report

    write_report(runs, output, with_text=not without_text)
    shown = "no texts" if without_text else "sample texts, so keep it where the texts are kept"
    typer.echo(f"{output} (it contains {shown})")
