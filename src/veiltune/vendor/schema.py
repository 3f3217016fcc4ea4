"""The vendor's SQL tables. No tensor, text or label is ever stored here; a test searches every row for a canary."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import ForeignKey, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


def now() -> datetime:
    """The time stamp of a row, UTC."""
    return datetime.now(UTC)


class Base(DeclarativeBase):
    """Root of the tables."""


class Job(Base):
    """One customer's fine-tuning job."""

    __tablename__ = "jobs"
    __table_args__ = (UniqueConstraint("tenant", "key"),)

    id: Mapped[str] = mapped_column(String(32), primary_key=True)
    tenant: Mapped[str] = mapped_column(String(63), index=True)
    key: Mapped[str] = mapped_column(String(64))
    spec: Mapped[bytes] = mapped_column(LargeBinary)
    base_digest: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)


class Call(Base):
    """A sequenced call that was carried out, by the hash of its frame."""

    __tablename__ = "calls"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    payload_hash: Mapped[bytes] = mapped_column(LargeBinary(32))


class UploadedChunk(Base):
    """A stored piece of a job's one-shot upload."""

    __tablename__ = "uploads"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    first_row: Mapped[int] = mapped_column(primary_key=True)
    rows: Mapped[int]
    payload_hash: Mapped[bytes] = mapped_column(LargeBinary(32))


class Checkpoint(Base):
    """A step from which a job can go on."""

    __tablename__ = "checkpoints"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)


class Audit(Base):
    """Who asked for what, and when: never with what content."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(default=now)
    tenant: Mapped[str] = mapped_column(String(63))
    action: Mapped[str] = mapped_column(String(32))
    job_id: Mapped[str] = mapped_column(String(32), default="")
