"""The job store: one job a key, tenants apart, numbers never used twice, checkpoints pruned."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy.exc import IntegrityError

from veiltune.errors import ProtocolError, StorageError, VendorRefusedError
from veiltune.vendor.jobs import CallRecord, JobStore


@pytest.fixture
def jobs(tmp_path: Path) -> JobStore:
    """A store on disk."""
    return JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def open_job(jobs: JobStore, tenant: str = "acme", key: str = "k1", spec: bytes = b"spec", limit: int = 2) -> str:
    """Opens with defaults; returns the job's id."""
    return jobs.open(tenant=tenant, key=key, spec=spec, base_digest="d", max_jobs=limit).id


def test_opening_twice_gives_the_same_job(jobs: JobStore) -> None:
    assert open_job(jobs) == open_job(jobs)
    assert open_job(jobs, tenant="other") != open_job(jobs)


def test_the_same_key_with_another_spec_is_refused(jobs: JobStore) -> None:
    open_job(jobs)
    with pytest.raises(ProtocolError, match="another spec"):
        open_job(jobs, spec=b"changed")


def test_a_tenant_has_a_limit_of_unfinished_jobs(jobs: JobStore) -> None:
    first = open_job(jobs, key="k1")
    open_job(jobs, key="k2")
    with pytest.raises(VendorRefusedError, match="2 unfinished jobs, the limit is 2"):
        open_job(jobs, key="k3")
    jobs.finish(tenant="acme", job_id=first, erase=False)
    open_job(jobs, key="k3")


def test_another_tenants_job_looks_like_none(jobs: JobStore) -> None:
    mine = open_job(jobs)
    refusals = []
    for job_id in (mine, "unknown"):
        with pytest.raises(VendorRefusedError) as refusal:
            jobs.get(tenant="other", job_id=job_id)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]


def test_a_number_is_recorded_once_even_across_restarts(jobs: JobStore, tmp_path: Path) -> None:
    job = open_job(jobs)
    jobs.record_calls([CallRecord(job, 0, "forward", b"h")])
    again = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    assert again.next_seq(job) == 1
    with pytest.raises(IntegrityError):
        again.record_calls([CallRecord(job, 0, "forward", b"h")])


def test_only_the_newest_checkpoints_are_kept_and_a_rewind_forgets_later_ones(jobs: JobStore) -> None:
    job = open_job(jobs)
    assert [jobs.record_checkpoint(job, step) for step in (10, 20, 30)] == [[], [], [10]]
    assert jobs.rewind(job, 20) == [30]
    assert jobs.checkpoints(job) == [20]


def test_a_database_that_cannot_be_written_is_a_storage_error(jobs: JobStore, tmp_path: Path) -> None:
    job = open_job(jobs)
    jobs._engine.dispose()
    (tmp_path / "jobs.sqlite").write_bytes(b"")  # as if truncated under the server: the tables are gone
    for leftover in tmp_path.glob("jobs.sqlite-*"):
        leftover.unlink()
    with pytest.raises(StorageError, match="cannot write the job database"):
        jobs.record_calls([CallRecord(job, 1, "forward", b"h")])
