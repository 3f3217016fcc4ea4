"""Veiltune: fine-tune language models on private text, and measure what leaks.

The public names below are loaded on first use: `import veiltune` itself loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from veiltune.errors import VeiltuneError

if TYPE_CHECKING:
    from veiltune.audit.options import AuditOptions
    from veiltune.audit.record import AttackRecord
    from veiltune.audit.split import audit_run
    from veiltune.config import TrainConfig, TuneConfig, VendorConfig, load_config
    from veiltune.customer.session import tune
    from veiltune.data.tables import Table, read_table
    from veiltune.dp.engine import make_private
    from veiltune.dp.plan import DPPlan
    from veiltune.dp.session import train
    from veiltune.dp.trainer import DPTrainer
    from veiltune.models.adapters import attach_peft, save_adapter
    from veiltune.models.finished import load_run
    from veiltune.models.loading import load_base
    from veiltune.models.merging import merged_model
    from veiltune.models.split import split_model
    from veiltune.privatize.mechanisms import Privatizer, make_privatizer
    from veiltune.report.page import write_report
    from veiltune.runs import RunFolder
    from veiltune.vendor.server import serve

__version__ = "0.1.0"

_HOMES = {
    "AttackRecord": "audit.record",
    "AuditOptions": "audit.options",
    "DPPlan": "dp.plan",
    "DPTrainer": "dp.trainer",
    "Privatizer": "privatize.mechanisms",
    "RunFolder": "runs",
    "Table": "data.tables",
    "TrainConfig": "config",
    "TuneConfig": "config",
    "VendorConfig": "config",
    "attach_peft": "models.adapters",
    "audit_run": "audit.split",
    "load_base": "models.loading",
    "load_config": "config",
    "load_run": "models.finished",
    "make_private": "dp.engine",
    "make_privatizer": "privatize.mechanisms",
    "merged_model": "models.merging",
    "read_table": "data.tables",
    "save_adapter": "models.adapters",
    "serve": "vendor.server",
    "split_model": "models.split",
    "train": "dp.session",
    "tune": "customer.session",
    "write_report": "report.page",
}

__all__ = [
    "AttackRecord",
    "AuditOptions",
    "DPPlan",
    "DPTrainer",
    "Privatizer",
    "RunFolder",
    "Table",
    "TrainConfig",
    "TuneConfig",
    "VeiltuneError",
    "VendorConfig",
    "attach_peft",
    "audit_run",
    "load_base",
    "load_config",
    "load_run",
    "make_private",
    "make_privatizer",
    "merged_model",
    "read_table",
    "save_adapter",
    "serve",
    "split_model",
    "train",
    "tune",
    "write_report",
]


def __getattr__(name: str) -> object:
    """Imports a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'veiltune' has no attribute {name!r}")
    return getattr(importlib.import_module(f"veiltune.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
