"""What `guard.toml` may say."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from veiltune.config.base import Address, Count, Device, Positive, Section, Threads


class ProtectSection(Section):
    """Strings that drawn text does not complete, and whose later part vectors do not tell."""

    files: list[str] = Field(default_factory=list)
    """manifests of `data synth` (all in it), CSV, TSV or Parquet with a column `value`, texts of a string a line"""
    unknown: Annotated[float, Field(ge=0, le=0.99)] = 0.5
    """share of each string that vectors and texts must not tell; 0: its last character"""
    shortest: Count = 5
    """fewest letters and digits of a string (ideographs count twice); a shorter one is refused"""


class MemfreeSection(Section):
    """No verbatim passages of the training text."""

    text: str = ""
    """CSV, TSV, JSONL or Parquet table with a column `text`, or a text with one record a line; empty: no filter"""
    n: Annotated[int, Field(ge=2)] = 10
    """tokens of a passage"""
    candidates: Count = 50
    """how many of the likeliest tokens are looked up"""
    false_positive_rate: Annotated[float, Field(ge=1e-12, le=0.5)] = 1e-4
    """of one look-up"""


class VectorSection(Section):
    """What is done to every vector, in this order; 0 leaves a step out."""

    reference: str = ""
    """public file like memfree.text, whose token shares stand where something is withheld; empty: all tokens alike"""
    temperature: Positive = 1.0
    """of the vectors"""
    top_k: Annotated[int, Field(ge=0)] = 0
    """tokens that keep a probability"""
    decimals: Annotated[int, Field(ge=0, le=12)] = 0
    """of the probabilities"""


class LimitsSection(Section):
    """How much may be asked."""

    rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """requests a second and key; 0: no limit"""
    burst: Count = 20
    """requests at once"""
    budget: Annotated[int, Field(ge=0, le=10**18)] = 0
    """queries a key in all (a vector, a new token, an echoed token); 0: no limit"""
    ledger: str = "guard-budget.sqlite"
    """file that counts them"""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 2**20
    """of one request"""
    max_prompts: Count = 64
    """of one request"""
    max_new_tokens: Count = 1024
    """of one request"""
    concurrent: Count = 64
    """requests that are answered or wait; one more is told to come back"""
    read_seconds: Positive = 10.0
    """in which a request must have come in"""


class GuardConfig(Section):
    """A guarded API: `veiltune guard serve MODEL --guard guard.toml`."""

    address: Address = "127.0.0.1:8000"
    """host:port to listen on; port 0 takes a free one"""
    keys: str = ""
    """file of `veiltune guard key`; needed on any address but loopback"""
    name: str = ""
    """of the model, as callers see it; empty: the last part of its path"""
    slots: Count = 16
    """texts that are written at the same time"""
    batch_tokens: Count = 2048
    """positions in one pass over prompts"""
    threads: Threads = 0
    """CPU threads; 0 = all"""
    device: Device = "cpu"
    """where the model computes: cpu, cuda or cuda:N"""
    protect: ProtectSection = ProtectSection()
    memfree: MemfreeSection = MemfreeSection()
    vector: VectorSection = VectorSection()
    limits: LimitsSection = LimitsSection()

    def words(self) -> str:
        """What stands between the model and its callers, in words; "" for nothing.

        >>> GuardConfig(protect={"files": ["list.txt"]}, vector={"top_k": 50, "decimals": 3}).words()
        'protected strings, top-k 50, 3 decimals'
        """
        vector = self.vector
        parts = (
            ("protected strings", bool(self.protect.files)),
            (f"{self.memfree.n}-gram filter", bool(self.memfree.text)),
            (f"temperature {vector.temperature:g}", vector.temperature != 1.0),
            (f"top-k {vector.top_k}", bool(vector.top_k)),
            (f"{vector.decimals} decimals", bool(vector.decimals)),
        )
        return ", ".join(words for words, used in parts if used)
