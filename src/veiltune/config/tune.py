"""What `tune.toml` may say."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from veiltune.config.base import Address, Count, Positive, Section, Seed, Threads, check_loopback


class VendorSection(Section):
    """How the customer reaches the vendor."""

    address: Address
    """host:port of the vendor"""
    credentials: str = ""
    """enrolment folder with tenant.key, tenant.crt and ca.crt"""
    plaintext: bool = False
    """no TLS; possible only on the loopback interface"""
    timeout_seconds: Annotated[float, Field(gt=0, le=86_400)] = 120.0
    """for one call, after which it is sent again"""

    @model_validator(mode="after")
    def _needs_credentials(self) -> Self:
        if self.plaintext:
            check_loopback(self.address)
            if self.credentials:
                raise ValueError("has credentials, which plaintext does not use; remove one of the two")
        elif not self.credentials:
            raise ValueError("needs credentials, the enrolment folder that the vendor issued")
        return self


class ModelSection(Section):
    """Which bottom model the customer accepts."""

    digest: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    """sha256 that the vendor's bottom bundle must have; empty keeps to the first and reports it in summary.json"""


class SplitSection(Section):
    """Where the model is cut, and who holds which part."""

    cut_layer: Annotated[int, Field(ge=0, lt=2**31)]
    """blocks in the bottom; 0 = embeddings only"""
    cut_embeddings: Literal["word", "block"] = "word"
    """at cut_layer 0: release word embeddings, or what leaves the whole embeddings block"""
    head: Literal["vendor", "customer"] = "vendor"
    """customer = U-shape: final norm, pooler and head stay with the customer"""
    bottom: Literal["frozen", "full", "lora", "bitfit", "adapter"] = "frozen"
    """what trains below the cut; anything but frozen releases every example again in each epoch"""


class DataSection(Section):
    """The customer's tables."""

    train: str
    """file (CSV, TSV, JSONL, Parquet) or hub:NAME:SPLIT"""
    eval: str
    """the same, for the utility that is reported"""
    text_column: str = "text"
    """column of the texts"""
    label_column: str = "label"
    """column of the labels"""
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = "auto"
    """auto goes by the file's ending"""
    max_length: Count = 128
    """tokens kept of one text"""


class ModelPrivacySection(Section):
    """DP of the finished model, against whoever may query it. Exactly one of epsilon and noise_multiplier."""

    epsilon: Positive | None = None
    """claimed for each example of the training table; the noise is calibrated to it"""
    noise_multiplier: Annotated[float, Field(ge=1e-3, le=1e6)] | None = None
    """standard deviation of the noise / clip_norm; epsilon is then what it is"""
    delta: Annotated[float, Field(ge=1e-12, lt=1)] | None = None
    """not set: the smaller of 1e-5 and 1 / (10 examples)"""
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """L2 norm that an example's gradient is clipped to, at the vendor"""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.epsilon is None) == (self.noise_multiplier is None):
            raise ValueError("needs exactly one of epsilon and noise_multiplier")
        return self


class PrivacySection(Section):
    """What is done to representations and labels before they leave. Exactly one strength, none for mechanism none."""

    mechanism: Literal["none", "d_chi", "gaussian"] = "d_chi"
    """noise on each token's representation"""
    eta: Annotated[float, Field(ge=1e-9, le=1e9)] | None = None
    """strength, 1 / distance: smaller is more private"""
    noise_to_norm: Annotated[float, Field(ge=1e-6, le=1e4)] | None = None
    """strength as mean noise norm / mean representation norm: larger is more private"""
    snr_db: Annotated[float, Field(ge=-200, le=200)] | None = None
    """strength as signal-to-noise ratio in decibels: smaller is more private"""
    cti: Literal["off", "budget", "top"] = "off"
    """contributing tokens get less noise: by score, or only the top fraction"""
    cti_top_fraction: Annotated[float, Field(gt=0, le=1)] = 0.01
    """share of the vocabulary that cti = top counts as contributing"""
    cti_top_multiplier: Annotated[float, Field(ge=1)] = math.inf
    """eta of those tokens is multiplied by this; inf sends them without noise"""
    cti_at_inference: bool = True
    """also scale the noise of texts without a label"""
    labels: Literal["randomized_response", "disclosed"] = "randomized_response"
    """disclosed: the output gradients give every label away"""
    label_epsilon: Positive = 3.0
    """of randomised response, for each label"""
    keep_releases: bool = True
    """of a trainable bottom: keep all of them in the outbox for the audit; false keeps what a resumption needs"""

    dp: ModelPrivacySection | None = None
    """also train the vendor's part under DP, for those who will query the finished model"""

    @model_validator(mode="after")
    def _exactly_one_strength(self) -> Self:
        given = [name for name in ("eta", "noise_to_norm", "snr_db") if getattr(self, name) is not None]
        if self.mechanism == "none":
            if given or self.cti != "off":
                surplus = (*given, "cti")[0]
                raise ValueError(f"has {surplus}, which means nothing without noise; remove it")
        elif len(given) != 1:
            raise ValueError(
                f"needs exactly one of eta, noise_to_norm, snr_db, got {', '.join(given) or 'none of them'}"
            )
        return self


class TrainSection(Section):
    """The fine-tuning itself."""

    method: Literal["lora", "bitfit", "adapter"] = "lora"
    """what trains in the vendor's part"""
    rank: Annotated[int, Field(ge=1, le=1024)] = 8
    """of LoRA"""
    alpha: Annotated[float, Field(gt=0, le=1e4)] = 16.0
    """of LoRA; updates are scaled by alpha / rank"""
    dropout: Annotated[float, Field(ge=0, le=0.9)] = 0.0
    """on the PEFT parameters' inputs"""
    adapter_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """bottleneck of an adapter"""
    epochs: Count = 3
    """passes over the training table"""
    batch_size: Count = 32
    """examples of one update"""
    micro_batches: Count = 1
    """calls that a batch is sent in"""
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 5e-4
    """peak of the schedule"""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """of AdamW"""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """share of the steps in which the learning rate rises"""
    seed: Seed = 0
    """of initialisation and dropout, known to the vendor; never of the noise"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of matrix products, on both sides; bf16 is faster where the hardware has it"""
    checkpoint_every: Count = 50
    """steps between checkpoints"""
    threads: Threads = 0
    """CPU threads; 0 = all"""
    customer_alone: bool = True
    """also train a small head on the bottom alone, so that the utility can be compared with sending nothing"""

    @model_validator(mode="after")
    def _micro_batches_fit(self) -> Self:
        if self.micro_batches > self.batch_size:
            raise ValueError(
                f"has {self.micro_batches} micro_batches for {self.batch_size} examples in batch_size; lower it"
            )
        return self


class WireSection(Section):
    """How tensors travel."""

    dtype: Literal["bf16", "fp32", "int8"] = "bf16"
    """rounding of representations, after the noise"""
    pad_to: Annotated[int, Field(ge=0, le=2**16)] = 0
    """lengths are rounded up to a multiple of this, so that they say less; 0 sends them as they are"""


class TuneConfig(Section):
    """A customer's run: `veiltune tune CONFIG`."""

    run: str = "runs/tune"
    """run folder"""
    noise_seed: Seed | None = None
    """TESTS ONLY: whoever knows it can remove the noise; None draws from the operating system"""
    vendor: VendorSection
    """how to reach the vendor"""
    model: ModelSection = ModelSection()
    """which bottom model to accept"""
    split: SplitSection
    """where the model is cut"""
    data: DataSection
    """the tables"""
    privacy: PrivacySection
    """what is done before anything leaves"""
    train: TrainSection = TrainSection()
    """the fine-tuning"""
    wire: WireSection = WireSection()
    """how tensors travel"""

    @model_validator(mode="after")
    def _dp_covers_all_that_trains(self) -> Self:
        if self.privacy.dp is None:
            return self
        if self.split.head != "vendor" or self.split.bottom != "frozen":
            raise ValueError("privacy.dp covers the vendor's part only; set split.head = vendor, split.bottom = frozen")
        if self.privacy.cti != "off":
            raise ValueError("privacy.dp needs cti = off: contributing tokens make each release depend on other texts")
        return self
