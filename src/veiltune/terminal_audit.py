"""The end of `veiltune audit RUN` of a split run: what the vendor could read, in one screen."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape
from rich.table import Table

from veiltune.audit.record import Attack, AttackRecord, Rate
from veiltune.report.figures import estimate_with_interval, figure, outwards
from veiltune.terminal import console


def print_audit(record: AttackRecord, run: Path) -> None:
    """Prints every attack on the text, the best on labels and all on attributes, each with its interval."""
    found = record.inversion
    table = Table("attack", "tokens recovered", "95 % interval", "seconds", title=f"audit of {run}, {record.preset}")
    for attack in found.attacks:
        if attack.reported is None:
            table.add_row(attack.name, f"{attack.status.replace('_', ' ')}: {escape(attack.reason)}", "", "")
        else:
            mark = "  <- strongest" if attack.name == found.strongest else ""
            interval = " to ".join(outwards(*attack.reported.interval()))
            table.add_row(attack.name, f"{figure(attack.reported.value)}{mark}", interval, f"{attack.seconds:.0f}")
    console.print(table)
    console.print(f"empirical privacy {escape(estimate_with_interval(found.empirical_privacy))}, an upper limit")
    labels = [(attack.reported.value, attack) for attack in record.labels.attacks if attack.reported is not None]
    if labels:
        _print_attack("labels", max(labels, key=lambda entry: entry[0])[1])
    for attribute in record.attributes:
        for attack in attribute.attacks:
            _print_attack(attribute.name, attack)
    for control in record.controls:
        verdict = "passed" if control.passed else "FAILED: do not rely on these figures"
        console.print(f"{control.name} control: {figure(control.rate.value)}, {verdict}", soft_wrap=True)
    console.print(f"the whole of it: {run / 'attacks.json'}; as a page: veiltune report {run}", soft_wrap=True)


def _print_attack(kind: str, attack: Attack) -> None:
    if attack.reported is not None:
        auc = "" if attack.auc is None else f", AUC {estimate_with_interval(attack.auc)}"
        line = f"{kind}: {_shown(attack.reported)} right{auc}, by {attack.name}"
        console.print(line, soft_wrap=True, markup=False)


def _shown(rate: Rate) -> str:
    return f"{figure(rate.value)} [{', '.join(outwards(*rate.interval()))}]"
