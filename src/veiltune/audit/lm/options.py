"""What `veiltune audit MODEL --manifest ...` is asked to do, and how large its presets are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from veiltune._validate import in_range, one_of
from veiltune.audit.options import LARGEST_SEED
from veiltune.errors import InputError


@dataclass(frozen=True, kw_only=True)
class AuditSize:
    """How much a preset asks of the model.

    Attributes:
        generations: Texts sampled from nothing.
        generated_tokens: Of each.
        contexts: Documents in which a value is tried, at most.
        candidates: Other values that a true one is ranked among, at most.
        ranked: Persons of each side whose values are ranked, at most, for each type.
        population: Documents of the population for RMIA and token frequencies, at most.
    """

    generations: int
    generated_tokens: int
    contexts: int
    candidates: int
    ranked: int
    population: int


PRESETS = MappingProxyType(
    {
        "ci": AuditSize(generations=200, generated_tokens=48, contexts=2, candidates=99, ranked=20, population=200),
        "std": AuditSize(generations=1000, generated_tokens=64, contexts=3, candidates=999, ranked=100, population=500),
        "full": AuditSize(
            generations=15_000, generated_tokens=256, contexts=4, candidates=999, ranked=500, population=2000
        ),
    }
)


@dataclass(frozen=True, kw_only=True)
class LeakageOptions:
    """One leakage audit.

    Attributes:
        model: Run folder of `veiltune train`, model folder, hub name, or http(s) address of an API.
        manifest: Of `veiltune data synth`; "" with `data` and `pii`.
        data: Folder with the training text in plain files, where there is no manifest.
        pii: Table of the secrets in it.
        only: File with ids of persons, one a line: judge them alone, with their twins.
        leave_out: The same: judge all but them.
        guard: `guard.toml` of a guard to put before a local model, as `veiltune guard serve` would; None for none.
        base: Public model that training started from; "" for the run's own, or none.
        tokenizer: Model folder or name with the tokenizer of an API's model; or the folder of the run that the API
            serves: then its base and its claim are taken, too.
        api_model: Name of the model at an API.
        key_variable: Environment variable with the API's key; "" for none.
        output: Folder for leakage.json; None for the run folder itself.
        preset: One of `PRESETS`.
        claimed_epsilon: What is claimed, where no run folder says so.
        delta: Of that claim.
        device: Where a local model computes.
        bf16: Whether its matrix products run in bfloat16.
        seed: Of halves, generations and ties; never of anything that the model was trained with.

    Raises:
        InputError: If options contradict one another.
    """

    model: str
    manifest: Path | None = None
    data: Path | None = None
    pii: Path | None = None
    only: Path | None = None
    leave_out: Path | None = None
    guard: Path | None = None
    base: str = ""
    tokenizer: str = ""
    api_model: str = ""
    key_variable: str = ""
    output: Path | None = None
    preset: str = "std"
    claimed_epsilon: float | None = None
    delta: float | None = None
    device: str = "cpu"
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        one_of(PRESETS, preset=self.preset)
        in_range(0, LARGEST_SEED, seed=self.seed)
        if (self.manifest is None) == (self.data is None):
            raise InputError("an audit of a language model needs --manifest, or --data together with --pii")
        if (self.data is None) != (self.pii is None):
            raise InputError("--data (the training text) and --pii (its secrets) are given together")
        if self.claimed_epsilon is not None and not self.claimed_epsilon > 0:
            raise InputError(f"--claimed-epsilon must be above 0, got {self.claimed_epsilon}")
        if self.delta is not None and self.claimed_epsilon is None:
            raise InputError("--delta is of --claimed-epsilon, which is not given; give both or neither")
        if self.delta is not None and in_range(0.0, 1.0, delta=self.delta) == 1.0:
            raise InputError("delta must be below 1, got 1.0")
        if self.is_api and self.guard is not None:
            raise InputError("--guard is for a local model; an API has its guard where it is served")
        if self.is_api and not self.tokenizer:
            raise InputError("an API needs --tokenizer: the run, model folder or name with the tokenizer of its model")

    @property
    def is_api(self) -> bool:
        """Whether the model is behind HTTP."""
        return self.model.startswith(("http://", "https://"))

    @property
    def size(self) -> AuditSize:
        """Of the preset."""
        return PRESETS[self.preset]
