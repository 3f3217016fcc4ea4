"""What `train.toml` may say."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from veiltune.config.base import Count, Device, NonNegative, Positive, Section, Seed, Threads
from veiltune.config.defences import Defences, DefencesSection

#: Keys of `[train]` that only some methods read. A run's own file spells every default out, so defaults pass.
_OF_METHODS = {
    "rank": ("lora", "rgp"),
    "targets": ("lora",),
    "alpha": ("lora",),
    "adapter_size": ("adapter", "compacter"),
    "phm_dim": ("compacter",),
}

_EMPTY = "; an empty value, as in --set train.epochs=, takes a key out"


class BaseModelSection(Section):
    """The pretrained model and what it is to learn."""

    name: str
    """minilm, smollm2, a local folder or a hub name"""
    task: Literal["classification", "generation"]
    """classes of texts, by an encoder; or texts themselves, by a causal language model"""


class TablesSection(Section):
    """The tables."""

    train: str
    """file (CSV, TSV, JSONL, Parquet, E2E) or hub:NAME:SPLIT"""
    eval: str
    """the same, for the scores that are reported; nothing is chosen by it"""
    format: Literal["auto", "e2e", "csv", "tsv", "jsonl", "parquet"] = "auto"
    """auto goes by the file's ending; e2e is a prompt, two bars and a target on each line, without column names"""
    text_column: str = "text"
    """classification: column of the texts"""
    label_column: str = "label"
    """classification: column of the labels"""
    classes: Annotated[list[str], Field(min_length=2)] | None = None
    """classification: all labels there are, in the order of their numbers; not set: those of the training table, which
    the claim does not cover"""
    prompt_column: str = "prompt"
    """generation: column of the prompts; empty to learn the targets as plain text"""
    target_column: str = "target"
    """generation: column of the texts to learn"""
    person_column: str = ""
    """column that says whose row it is: then a person with all its records is protected; empty protects each example"""
    max_length: Count = 128
    """tokens of one example, special ones included; longer ones are cut and counted"""
    separator: str = "\n"
    """generation: between prompt and target; a special token's name stands for that token"""
    loss_on: Literal["target", "all"] = "target"
    """generation: learn the target only, or the prompt too"""

    @model_validator(mode="after")
    def _classes_differ(self) -> Self:
        if self.classes and len(set(self.classes)) < len(self.classes):
            raise ValueError("has a class twice in classes; name each once")
        return self


class BudgetSection(Section):
    """What is claimed. Exactly one of epsilon, noise_multiplier and disabled = true."""

    epsilon: Positive | None = None
    """of the whole run; the noise is calibrated to it"""
    noise_multiplier: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """standard deviation of the noise / clip_norm; epsilon is then what it is"""
    disabled: bool = False
    """no clipping and no noise: the yardstick, which protects nothing"""
    delta: Annotated[float, Field(ge=1e-12, lt=1)] | None = None
    """not set: the smaller of 1e-5 and 1 / (10 units)"""
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """L2 norm that a unit's gradient is clipped to"""
    clipping: Literal["flat", "per_layer", "automatic"] = "flat"
    """the whole gradient, each tensor apart, or scaled to the norm always (AUTO-S)"""
    max_records: Count | None = None
    """of one person in one step, drawn anew each time; not set: all"""

    @model_validator(mode="after")
    def _exactly_one_strength(self) -> Self:
        given = [name for name in ("epsilon", "noise_multiplier") if getattr(self, name) is not None]
        given += ["disabled = true"] if self.disabled else []
        if len(given) != 1:
            raise ValueError(
                "needs exactly one of epsilon, noise_multiplier, disabled = true, got "
                f"{', '.join(given) or 'none of them'}{_EMPTY if len(given) > 1 else ''}"
            )
        if self.disabled and self.delta is not None:
            raise ValueError("has delta, which means nothing without noise; remove it")
        for name in ("clip_norm", "clipping"):
            if self.disabled and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"has {name}, and disabled = true clips nothing; remove it")
        return self


class FineTuningSection(Section):
    """The fine-tuning itself. Exactly one of epochs and steps. Dropout is off: the noise regularises already."""

    method: Literal["lora", "adapter", "compacter", "bitfit", "rgp", "full"] = "lora"
    """what trains"""
    rank: Count = 8
    """of LoRA's updates or of RGP's gradient carriers"""
    alpha: Positive = 16.0
    """of LoRA; updates are scaled by alpha / rank"""
    adapter_size: Annotated[int, Field(ge=1, le=2**16)] = 64
    """bottleneck of an adapter or a Compacter"""
    phm_dim: Count = 4
    """Compacter: Kronecker products of this many terms"""
    pooler: bool = True
    """classes: also train BERT's pretrained pooler, a part of its head; without it there is less to add noise to"""
    targets: list[str] | None = None
    """LoRA: last names of the projections; not set: the family's own"""
    epochs: Positive | None = None
    """expected visits of each unit"""
    steps: Count | None = None
    """updates"""
    batch_size: Positive = 32.0
    """units of one update on average: each is drawn independently (Poisson), so sizes vary"""
    learning_rate: Annotated[float, Field(gt=0, le=1e3)] = 1e-3
    """peak of the schedule"""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """of the learning rate after the warm-up; linear and cosine end at 0"""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of the steps in which the learning rate rises"""
    weight_decay: NonNegative = 0.0
    """of AdamW"""
    seed: Seed = 0
    """of initialisation and of the scores' bootstrap; never of sampling and noise"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of matrix products; bf16 is faster where the hardware has it"""
    micro_batch: Count = 32
    """examples differentiated at once: memory, not the result"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them"""
    checkpoint_every: Count = 50
    """steps between checkpoints"""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """steps between looks at the evaluation table, perplexity or accuracy only; 0: at the end"""
    save_merged: bool = False
    """also write the whole model as a plain Hugging Face checkpoint"""
    threads: Threads = 0
    """CPU threads; 0 = all"""
    device: Device = "cpu"
    """where the model computes: cpu, cuda or cuda:N"""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            got = "neither" if self.epochs is None else "both"
            raise ValueError(f"needs exactly one of epochs and steps, got {got}{_EMPTY if got == 'both' else ''}")
        if self.save_merged and self.method in ("adapter", "compacter"):
            raise ValueError(
                f"has save_merged, but method {self.method!r} adds layers that a plain model has not; remove it"
            )
        for name, methods in _OF_METHODS.items():
            if self.method not in methods and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"has {name}, which is for method {' or '.join(methods)}, and method is {self.method}; remove it"
                )
        return self


class EvaluationSection(Section):
    """How generated texts are made and scored."""

    examples: Annotated[int, Field(ge=0)] = 0
    """prompts to generate for, from the first on; 0: all; perplexity and accuracy always take the whole table"""
    max_new_tokens: Count = 64
    """of one text"""
    num_beams: Count = 1
    """1 decodes greedily"""
    length_penalty: Annotated[float, Field(allow_inf_nan=False)] = 1.0
    """of beam search; more prefers longer texts"""
    batch_size: Count = 32
    """examples or prompts at once"""


class ReportSection(Section):
    """Where else progress is written."""

    tensorboard: bool = False
    """event files in the run folder, if the package tensorboard is installed; as private as metrics.jsonl"""


class TrainConfig(Section):
    """A run of private fine-tuning: `veiltune train CONFIG`."""

    run: str = "runs/train"
    """run folder"""
    noise_seed: Seed | None = None
    """TESTS ONLY: whoever knows it can remove the noise; None draws from the operating system"""
    model: BaseModelSection
    """what to start from"""
    data: TablesSection
    """the tables"""
    privacy: BudgetSection
    """what is claimed"""
    train: FineTuningSection
    """the fine-tuning"""
    defences: DefencesSection = DefencesSection()
    """what happens to the text before and while it is learnt"""
    evaluation: EvaluationSection = EvaluationSection()
    """scores of generated texts"""
    report: ReportSection = ReportSection()
    """where else progress is written"""

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.data.format == "e2e" and (self.model.task != "generation" or self.data.person_column):
            raise ValueError("data.format e2e has prompts and targets and no persons; use a table for anything else")
        if self.data.classes and self.model.task != "classification":
            raise ValueError("data.classes are of a classification; remove them")
        if self.privacy.max_records is not None and not self.data.person_column:
            raise ValueError("privacy.max_records is of a person, and data.person_column names none; remove it")
        return self

    @model_validator(mode="after")
    def _defences_fit(self) -> Self:
        asked, public = self.defences, self.privacy.disabled
        if asked.preset in ("light", "standard") and not public:
            raise ValueError(
                f"has defences.preset {asked.preset!r}, which looks across persons and at training rows without noise;"
                " with privacy use preset 'dp'"
            )
        if asked.preset == "dp" and public:
            raise ValueError("has defences.preset 'dp' and no privacy; set privacy.epsilon, or use preset 'standard'")
        if asked.preset != "none" and self.train.method == "full":
            raise ValueError("has a preset of defences, which train few parameters; set train.method, or no preset")
        if asked.stop_on_memorisation and not public:
            raise ValueError("has defences.stop_on_memorisation, which looks at training rows without noise; remove it")
        if asked.dedupe and asked.dedupe < 0.3:
            raise ValueError(f"has defences.dedupe {asked.dedupe:g}; near-duplicates are found from 0.3 on, 0 is off")
        if asked.max_records and not self.data.person_column:
            raise ValueError("has defences.max_records, which are of a person; set data.person_column")
        if asked.known and self.settled_defences().scrub == "off":
            raise ValueError("has defences.known, which only a scrub looks for; set defences.scrub, or remove it")
        if self.model.task == "classification" and (
            asked.mask_personal or asked.goldfish or asked.stop_on_memorisation or asked.preset == "standard"
        ):
            raise ValueError("has defences of texts that a model learns to write; for classes use preset light or dp")
        return self

    def settled_defences(self) -> Defences:
        """What `defences` comes to in this run."""
        return self.defences.settled(persons=bool(self.data.person_column), generation=self.model.task == "generation")
