"""What `vendor.toml` may say."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from veiltune.config.base import Address, Count, Device, Positive, Section, Threads, check_loopback


class VendorConfig(Section):
    """A vendor's server: `veiltune vendor serve CONFIG`."""

    model: str
    """base model: minilm, a local folder or a hub name"""
    address: Address = "127.0.0.1:50051"
    """host:port to listen on; port 0 takes a free one"""
    state: str = "vendor-state"
    """folder of authority, job database and checkpoints"""
    database: str = ""
    """SQLAlchemy URL of the job store; empty: SQLite in the state folder"""
    blobs: str = ""
    """fsspec URL of uploads and checkpoints; empty: the state folder"""
    plaintext: bool = False
    """no TLS and no tenants; possible only on the loopback interface"""
    max_jobs_per_tenant: Count = 16
    """unfinished jobs that one tenant may have"""
    max_cut_layer: Annotated[int, Field(ge=0)] | None = None
    """blocks that may be disclosed; None: all"""
    max_message_bytes: Annotated[int, Field(ge=2**16, lt=2**31)] = 64 * 2**20
    """of one call"""
    norm_bound: Positive = 1e6
    """largest L2 norm of a token's representation that is accepted"""
    threads: Threads = 0
    """CPU threads; 0 = all"""
    device: Device = "cpu"
    """where the model computes: cpu, cuda or cuda:N"""

    @model_validator(mode="after")
    def _plaintext_is_local(self) -> Self:
        if self.plaintext:
            check_loopback(self.address)
        return self
