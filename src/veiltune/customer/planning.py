"""`--dry-run`: what a run would release and train, from its configuration and data alone; nothing is sent."""

from __future__ import annotations

from veiltune.config import TuneConfig, dump_toml
from veiltune.customer.model_privacy import model_plan
from veiltune.customer.session import read_tables
from veiltune.dp.plan import DPPlan
from veiltune.privatize.labels import keep_probability
from veiltune.runs import RunFolder


def plan(config: TuneConfig) -> dict[str, str]:
    """The run in words, a line each. Reads the data and looks at the run folder, writes nothing, contacts nobody."""
    RunFolder.is_begun(config.run, config=dump_toml(config))
    train, evaluation, labels = read_tables(config)
    private = model_plan(config, len(train.texts))
    steps = private.steps if private else -(-len(train.texts) // config.train.batch_size) * config.train.epochs
    return {
        "data": f"{len(train.texts)} training examples ({len(set(train.texts))} different texts), "
        f"{len(evaluation.texts)} for evaluation, {len(labels)} classes",
        "releases": _releases(config, len(set(train.texts)), len(set(evaluation.texts))),
        "mechanism": _mechanism(config),
        "labels": _labels(config, len(labels)),
        **_finished_model(private),
        "lengths": f"rounded up to multiples of {config.wire.pad_to}" if config.wire.pad_to else "shown exactly",
        "cut": f"after {config.split.cut_layer} blocks, bottom {config.split.bottom}, head at the {config.split.head}",
        "training": f"{config.train.method} at the vendor, {config.train.epochs} epochs, {steps} steps of "
        f"{config.train.batch_size} examples in {config.train.micro_batches} call(s), {config.train.precision}",
        "vendor": f"{config.vendor.address} ({'plaintext on loopback' if config.vendor.plaintext else 'mTLS'}), "
        f"{config.wire.dtype} on the wire",
        "noise": "from the operating system's CSPRNG"
        if config.noise_seed is None
        else f"SEEDED with {config.noise_seed}: for tests only, protects nothing",
        "run folder": config.run,
    }


def _finished_model(plan: DPPlan | None) -> dict[str, str]:
    if plan is None:
        return {"finished model": "no DP: it may remember training examples"}
    return {f"model: {name}": value for name, value in plan.describe().items()}


def _releases(config: TuneConfig, train_texts: int, eval_texts: int) -> str:
    if config.split.bottom == "frozen":
        return f"{train_texts} training texts once each, {eval_texts} evaluation texts once each"
    return (
        f"every training text again in each of {config.train.epochs} epochs (about {train_texts * config.train.epochs} "
        f"releases; the bounds add up), {eval_texts} evaluation texts once each"
    )


def _mechanism(config: TuneConfig) -> str:
    privacy = config.privacy
    if privacy.mechanism == "none":
        return "none: representations are sent as they are; the vendor can read the text from them"
    strengths = {"eta": privacy.eta, "noise_to_norm": privacy.noise_to_norm, "snr_db": privacy.snr_db}
    (given,) = [f"{name} = {value}" for name, value in strengths.items() if value is not None]
    return f"{privacy.mechanism}, {given}, contributing tokens {privacy.cti}"


def _labels(config: TuneConfig, num_classes: int) -> str:
    if config.privacy.labels == "disclosed":
        return "DISCLOSED: the returned gradients reveal every label exactly"
    epsilon = config.privacy.label_epsilon
    kept = keep_probability(num_classes, epsilon)
    return f"randomised response once, label epsilon {epsilon:g}: a label is kept with probability {kept:.3f}"
