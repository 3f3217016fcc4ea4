"""What binds a run folder of private training to one plan, table, model and version. Loads no torch.

private/key           32 bytes that sampling and noise derive from: whoever has it and the model can subtract the noise
        run.json      the plan, and what tells another table, model or version from the run's own
        checkpoints/  trainable tensors and AdamW's moments at a step (`veiltune.dp.checkpoints`)
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import Any

from veiltune.config import TrainConfig, dump_toml
from veiltune.csprng import KEY_BYTES
from veiltune.dp.plan import DPPlan
from veiltune.errors import ConfigError, InputError, PrivacyError
from veiltune.runs import RunFolder, atomic_write_bytes, toml_differences


@dataclass(frozen=True)
class RunCard:
    """What a run began with.

    Attributes:
        plan: `DPPlan.to_dict`.
        data: Fingerprint of the training rows under the run's key.
        model: Fingerprint of weights, configuration and encoded rows under the run's key.
        version: `code_version`: other code might compute other gradients under the same noise.
    """

    plan: dict[str, Any]
    data: str
    model: str
    version: str

    @classmethod
    def load(cls, run: RunFolder) -> RunCard | None:
        """The card of a run folder, if the run has one.

        Raises:
            InputError: If it cannot be read.
        """
        path = run.path / "private" / "run.json"
        if not path.exists():
            return None
        try:
            return cls(**json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise InputError(f"{path} was changed after the run wrote it; name another folder as `run`") from None

    def save(self, run: RunFolder) -> None:
        """Writes the card."""
        atomic_write_bytes(run.private / "run.json", json.dumps(asdict(self)).encode(), mode=0o600)


def run_key(run: RunFolder, noise_seed: int | None) -> bytes:
    """The key of sampling and noise: drawn once from the operating system, or by a test's seed."""
    path = run.private / "key"
    if not path.exists():
        seeded = hashlib.sha256(f"train with noise seed {noise_seed}".encode()).digest()
        atomic_write_bytes(path, os.urandom(KEY_BYTES) if noise_seed is None else seeded, mode=0o600)
    return path.read_bytes()


def check_same_run(run: RunFolder, config: TrainConfig, plan: DPPlan) -> None:
    """Refuses to take up a run under another plan or configuration; a folder without a run passes.

    Args:
        run: The folder.
        config: The configuration now.
        plan: The plan now, made from the table as it is now.

    Raises:
        PrivacyError: If the plan differs: the claim would be that of neither; lists what does.
        ConfigError: If another key differs; lists which.
        InputError: If the folder's files cannot be read.
    """
    card = RunCard.load(run)
    changes = [] if card is None else DPPlan.from_dict(card.plan).differences(plan)
    if changes:
        raise PrivacyError(
            f"{run.path} was begun with another plan ({'; '.join(changes)}), and no claim holds for a mixture; "
            "restore the plan and the table, or name another folder as `run`"
        )
    if run.config_path.exists():
        changes = toml_differences(run.config_path.read_bytes(), dump_toml(config))
        if changes:
            raise ConfigError(
                f"{run.path} was begun with another configuration ({'; '.join(changes)}); restore it, or name another "
                "folder as `run`"
            )


def check_same_card(run: RunFolder, card: RunCard) -> None:
    """Writes the card of a new run; refuses to take up a run with another table, model or version.

    Raises:
        PrivacyError: If one differs; says which.
    """
    before = RunCard.load(run)
    if before is None:
        card.save(run)
        return
    for name, what in (
        ("data", "training data or the key"),
        ("model", "base model (weights, configuration or tokenizer)"),
        ("version", "version of Veiltune"),
    ):
        if getattr(before, name) != getattr(card, name):
            raise PrivacyError(
                f"the {what} has changed since run {run.path} began, and the same noise on two different sums can be "
                "subtracted; restore it, or name another folder as `run`"
            )
