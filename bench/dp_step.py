"""One step of training with and without privacy: time, memory and exactness of every contender.

    python bench/dp_step.py                                 # five rounds on one thread, about an hour
    python bench/dp_step.py --rounds 1 --only plain ours    # some of them
    python bench/dp_step.py --quick                         # a toy size, to see that everything works

GPT-2's shape with random weights and ids, AdamW included: LoRA (r 4 on c_attn) at 32 rows of 128 tokens, full
fine-tuning with a tied head at 16. Each contender has a process of its own, built once; the processes take steps in
turn, never two at a time, and the first round is dropped. Time is processor seconds (user and system), ratios are
within a round, and their median and range are shown. Memory is the growth of the peak resident set over the model as
built. grad_error compares the clipped mean gradient of four rows, without noise, to a batch-of-one loop.
Opacus is optional (pip install opacus==1.6.0). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dp_contenders import contenders

SUITES = ("lora", "full")
WORKER = Path(__file__).with_name("dp_contenders.py")


@dataclass
class Row:
    """What was measured of one contender."""

    seconds: list[float] = field(default_factory=list)
    megabytes: float | None = None
    grad_error: float | None = None
    refused: str | None = None


class Process:
    """A contender's process and the line to it."""

    def __init__(self, suite: str, name: str, *, device: str, quick: bool, threads: int) -> None:
        command = [sys.executable, str(WORKER), suite, name, device, *(["--quick"] if quick else [])]
        own = {variable: str(threads) for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = os.environ | own | {"TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, command: str) -> dict[str, Any]:
        """Waits for the answer; a process that died has refused."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return {"refused": "the process ended"}
        line = self._process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"refused": "the process ended (out of memory?)"}
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def run_suite(suite: str, names: list[str], arguments: argparse.Namespace) -> dict[str, Row]:
    """Builds all, steps them in turn, then asks for memory and exactness."""
    options = {"device": arguments.device, "quick": arguments.quick, "threads": arguments.threads}
    rows = {name: Row() for name in names}
    processes = {name: Process(suite, name, **options) for name in names}

    def ask(name: str, command: str) -> dict[str, Any]:
        answer: dict[str, Any] = {} if rows[name].refused else processes[name].ask(command)
        rows[name].refused = answer.get("refused", rows[name].refused)
        return answer

    try:
        for name in names:
            ask(name, "build")
        for number in range(arguments.rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                seconds = ask(name, "step").get("seconds")
                if seconds is not None and number:
                    rows[name].seconds.append(seconds)
            print(f"{suite}: {'warm-up' if not number else f'round {number}'} done", file=sys.stderr, flush=True)
        for name in names:
            rows[name].megabytes = ask(name, "memory").get("megabytes")
        for name in names:
            rows[name].grad_error = ask(name, "error").get("grad_error")
    finally:
        for process in processes.values():
            process.close()
    return rows


def time_ratios(rows: dict[str, Row], name: str, to: str) -> list[float]:
    """Round by round; empty where one of the two is missing."""
    if name not in rows or to not in rows or rows[name].refused or rows[to].refused:
        return []
    return [one / other for one, other in zip(rows[name].seconds, rows[to].seconds, strict=True)]


def middle(ratios: list[float]) -> float | None:
    """The median, rounded."""
    return round(statistics.median(ratios), 3) if ratios else None


def memory_ratio(rows: dict[str, Row], name: str, to: str = "plain") -> float | None:
    """Of the peaks' growth."""
    one, other = (rows[key].megabytes if key in rows else None for key in (name, to))
    return round(one / other, 3) if one and other else None


def show(suite: str, rows: dict[str, Row]) -> None:
    """The suite's table."""
    print(f"\n{suite}\n{'contender':18} {'s/step':>8} {'x plain':>8} {'range':>13} {'MB':>7} {'x plain':>8} grad_error")
    for name, row in rows.items():
        if row.refused:
            print(f"{name:18} refused: {row.refused}")
            continue
        ratios = time_ratios(rows, name, "plain")
        span = f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else ""
        error = "" if row.grad_error is None else f"{row.grad_error:.1e}"
        print(
            f"{name:18} {statistics.median(row.seconds):8.3f} {middle(ratios) or '':>8} {span:>13} "
            f"{row.megabytes:7.0f} {memory_ratio(rows, name) or '':>8} {error}"
        )


def summary(suite: str, rows: dict[str, Row]) -> dict[str, Any]:
    """The suite's figures."""
    whole, micro = ("ours", "ours_micro8") if suite == "lora" else ("ours_micro4", "ours_micro1")
    figures: dict[str, Any] = {
        "time_ratio": middle(time_ratios(rows, whole, "plain")),
        "time_ratio_micro": middle(time_ratios(rows, micro, "plain")),
        "memory_ratio": memory_ratio(rows, whole),
        "memory_ratio_micro": memory_ratio(rows, micro),
        "vs_own_non_private": middle(time_ratios(rows, whole, "ours_non_private")),
        "loop_ratio": middle(time_ratios(rows, "loop", whole)),
        "compared": whole,
        "micro": micro,
    }
    if suite == "lora":
        figures["time_ratio_checkpointed"] = middle(time_ratios(rows, "ours_checkpointed", "plain"))
        figures["memory_ratio_checkpointed"] = memory_ratio(rows, "ours_checkpointed")
    for name in rows:
        if name.startswith("opacus"):
            figures[f"{name}_ratio"] = middle(time_ratios(rows, name, whole))
    figures["ranges"] = {
        name: [round(min(ratios), 3), round(max(ratios), 3)]
        for name in rows
        if (ratios := time_ratios(rows, name, "plain"))
    }
    figures["seconds"] = {name: middle(row.seconds) for name, row in rows.items() if row.seconds}
    figures["megabytes"] = {name: round(row.megabytes, 1) for name, row in rows.items() if row.megabytes is not None}
    figures["grad_error"] = {name: row.grad_error for name, row in rows.items() if row.grad_error is not None}
    figures["refused"] = {name: row.refused for name, row in rows.items() if row.refused}
    return figures


def bf16_summary(suites: dict[str, dict[str, Row]]) -> dict[str, Any]:
    """How many times faster than float32 the same code is, and how far from it."""
    figures: dict[str, Any] = {}
    for suite, rows in suites.items():
        ratios = time_ratios(rows, "ours" if suite == "lora" else "ours_micro4", "ours_bf16")
        if ratios:
            figures[f"{suite}_speedup"] = middle(ratios)
            figures[f"{suite}_range"] = [round(min(ratios), 3), round(max(ratios), 3)]
            figures[f"{suite}_grad_error"] = rows["ours_bf16"].grad_error
    return figures


def device_name(device: str, threads: int) -> str:
    """What it ran on."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {threads} thread{'s' * (threads > 1)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; one more warms up")
    parser.add_argument("--suite", choices=SUITES, nargs="+", default=SUITES)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contenders; all if not given")
    parser.add_argument("--quick", action="store_true", help="a toy size and one round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    known = sorted({name for suite in SUITES for name in contenders(suite)})
    if unknown := set(arguments.only or ()) - set(known):
        parser.error(f"no contender {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads must be at least 1")
    if arguments.quick:
        arguments.rounds = 1
    suites = {}
    for suite in arguments.suite:
        names = [name for name in contenders(suite) if arguments.only is None or name in arguments.only]
        if names:
            suites[suite] = run_suite(suite, names, arguments)
            show(suite, suites[suite])
    result: dict[str, Any] = {"bench": "dp_step"}
    result |= {suite: summary(suite, rows) for suite, rows in suites.items()}
    result |= {"bf16": bf16_summary(suites), "rounds": arguments.rounds, "quick": arguments.quick, "seed": 0}
    result["device"] = device_name(arguments.device, arguments.threads)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
