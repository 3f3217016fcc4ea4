"""The job store: which jobs exist, which calls were carried out, what can be resumed. SQL by SQLAlchemy.

SQLite in WAL mode by default, any SQLAlchemy URL otherwise. The schema is brought up to date by Alembic at opening.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import alembic.command
import alembic.config
from sqlalchemy import Engine, create_engine, delete, event, func, insert, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from veiltune.errors import ProtocolError, StorageError, VendorRefusedError
from veiltune.vendor.schema import Audit, Call, Checkpoint, Job, UploadedChunk

KEPT_CHECKPOINTS = 2
_INSERT_CALL = insert(Call)  # the one statement of every training step: without the ORM it takes a third of the time


class CallRecord(NamedTuple):
    """A sequenced call that was carried out."""

    job_id: str
    seq: int
    kind: str
    payload_hash: bytes


class JobStore:
    """Durable facts about jobs; every method is one transaction."""

    def __init__(self, url: str) -> None:
        self._engine = create_engine(url)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine, "connect", _use_write_ahead_log)
        migrate(self._engine)

    def close(self) -> None:
        """Releases the database."""
        self._engine.dispose()

    def open(self, *, tenant: str, key: str, spec: bytes, base_digest: str, max_jobs: int) -> Job:
        """Finds the tenant's job of that key or creates it. A finished one is running again; an erased one is not.

        Raises:
            ProtocolError: If the key was used for another spec or another base model.
            VendorRefusedError: If the tenant has `max_jobs` unfinished jobs already.
        """
        with self._transaction() as session:
            job = session.scalar(select(Job).where(Job.tenant == tenant, Job.key == key))
            if job is None:
                job = Job(id=secrets.token_hex(8), tenant=tenant, key=key, spec=spec, base_digest=base_digest, state="")
                session.add(job)
            _check_same(job, spec, base_digest)
            if job.state in ("RUNNING", "ERASED"):
                return job
            unfinished = session.scalar(
                select(func.count()).select_from(Job).where(Job.tenant == tenant, Job.state == "RUNNING")
            )
            if unfinished is not None and unfinished >= max_jobs:
                raise VendorRefusedError(
                    f"tenant has {unfinished} unfinished jobs, the limit is {max_jobs}; finish one with `veiltune tune`"
                )
            job.state = "RUNNING"
            session.add(Audit(tenant=tenant, action="open", job_id=job.id))
            return job

    def get(self, *, tenant: str, job_id: str) -> Job:
        """The tenant's own job.

        Raises:
            VendorRefusedError: If there is none; the same words whether it is unknown or another tenant's.
        """
        with self._session() as session:
            job = session.get(Job, job_id)
            if job is None or not secrets.compare_digest(job.tenant, tenant):
                raise VendorRefusedError("no such job for this tenant; open the job again")
            return job

    def record_calls(self, calls: Sequence[CallRecord]) -> None:
        """Notes that sequenced calls were carried out. (job, seq) is unique, so a second one cannot be noted."""
        with _storage_errors(), self._engine.begin() as connection:
            connection.execute(_INSERT_CALL, [call._asdict() for call in calls])

    def next_seq(self, job_id: str) -> int:
        """One more than the largest seq noted; passes are noted with their update, so a kill frees their numbers."""
        with self._session() as session:
            largest = session.scalar(select(func.max(Call.seq)).where(Call.job_id == job_id))
            return 0 if largest is None else largest + 1

    def record_upload(self, job_id: str, first_row: int, rows: int, payload_hash: bytes) -> None:
        """Notes a stored piece of the upload."""
        self._add(UploadedChunk(job_id=job_id, first_row=first_row, rows=rows, payload_hash=payload_hash))

    def uploads(self, job_id: str) -> list[UploadedChunk]:
        """The stored pieces in row order."""
        with self._session() as session:
            query = select(UploadedChunk).where(UploadedChunk.job_id == job_id).order_by(UploadedChunk.first_row)
            return list(session.scalars(query))

    def record_checkpoint(self, job_id: str, step: int) -> list[int]:
        """Notes a checkpoint and forgets all but the newest few; returns the forgotten steps."""
        with self._transaction() as session:
            session.merge(Checkpoint(job_id=job_id, step=step))
            session.flush()
            forgotten = self._steps(session, job_id)[:-KEPT_CHECKPOINTS]
            session.execute(delete(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step.in_(forgotten)))
            return forgotten

    def rewind(self, job_id: str, step: int) -> list[int]:
        """Forgets checkpoints later than `step`; returns them."""
        with self._transaction() as session:
            later = [s for s in self._steps(session, job_id) if s > step]
            session.execute(delete(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.step.in_(later)))
            return later

    def checkpoints(self, job_id: str) -> list[int]:
        """Steps from which the job can go on, ascending."""
        with self._session() as session:
            return self._steps(session, job_id)

    def finish(self, *, tenant: str, job_id: str, erase: bool) -> str:
        """Ends a job: its upload is forgotten, with `erase` its checkpoints too. Returns the new state."""
        state = "ERASED" if erase else "FINISHED"
        with self._transaction() as session:
            session.get_one(Job, job_id).state = state
            session.add(Audit(tenant=tenant, action=state.lower(), job_id=job_id))
            session.execute(delete(UploadedChunk).where(UploadedChunk.job_id == job_id))
            if erase:
                session.execute(delete(Checkpoint).where(Checkpoint.job_id == job_id))
        return state

    def audit(self, *, tenant: str, action: str, job_id: str = "") -> None:
        """Adds one line to the audit trail."""
        self._add(Audit(tenant=tenant, action=action, job_id=job_id))

    def _session(self) -> Session:
        return Session(self._engine, expire_on_commit=False)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Session]:
        with _storage_errors(), self._session() as session, session.begin():
            yield session

    def _add(self, row: Any) -> None:
        with self._transaction() as session:
            session.add(row)

    @staticmethod
    def _steps(session: Session, job_id: str) -> list[int]:
        return sorted(session.scalars(select(Checkpoint.step).where(Checkpoint.job_id == job_id)))


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except OperationalError as error:
        raise StorageError(f"cannot write the job database: {error.orig}") from error


def migrate(engine: Engine) -> None:
    """Brings the schema up to date."""
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "head")


def _check_same(job: Job, spec: bytes, base_digest: str) -> None:
    if job.spec != spec:
        raise ProtocolError("this job key was opened with another spec; start a new run folder to change settings")
    if job.base_digest != base_digest:
        raise ProtocolError("the vendor's base model has changed since this job was opened; start a new run")


def _use_write_ahead_log(connection: Any, _record: object) -> None:
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "busy_timeout=30000", "foreign_keys=ON"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
