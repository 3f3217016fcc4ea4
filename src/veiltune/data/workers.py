"""What the commands over large files share: work in several processes, and a folder from which a killed run goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar

from veiltune._validate import positive_int
from veiltune.data.streaming import Source
from veiltune.errors import DataError, InputError, VeiltuneError
from veiltune.runs import atomic_write_bytes, private_folder, storage_errors

Job = TypeVar("Job")
Result = TypeVar("Result")

_PRIVATE = "private"
_IDENTITY = "run.json"
_WORTH_A_PROCESS = 8 * 10**6
_AHEAD = 2  # jobs a process that wait or whose results do


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processes_for(wanted: int, size: int) -> int:
    """So many as are wanted; for 0 one a core, but no more than there are 8 MB for each, since each takes a second."""
    return wanted or max(1, min(cores(), size // _WORTH_A_PROCESS))


def in_order(
    work: Callable[[Job], Result],
    jobs: Iterable[Job],
    *,
    processes: int,
    prepare: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Iterator[Result]:
    """The results of jobs in their order, computed in processes of their own; few wait at a time.

    Args:
        work: A function of a module, for one job.
        jobs: Taken up one by one.
        processes: With 1, all is done in this process.
        prepare: Called once in each process, before its first job.
        arguments: Of `prepare`; handed to a process through a pipe, never through a file.

    Raises:
        InputError: If processes is below 1.
        VeiltuneError: If a process was killed; also whatever a job raises.
    """
    if positive_int(processes=processes) == 1:
        prepare(*arguments)
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), _start, (prepare, arguments)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) >= _AHEAD * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise VeiltuneError(
                "a worker process was killed, perhaps for want of memory; the same command goes on, see --processes"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start(prepare: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    prepare(*arguments)


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def check_sources(sources: Sequence[Source], output: Path) -> None:
    """Refuses sources that would have the same name in the output folder, or that are already in it.

    Raises:
        InputError: If so.
    """
    names = [source.path.name for source in sources]
    if not names:
        raise InputError("name at least one file")
    if len(set(names)) < len(names):
        raise InputError("two of the files have the same name; the output folder keeps names, so rename one")
    if any(source.path.resolve().parent == output.resolve() for source in sources):
        raise InputError(f"{output} is the folder of an input file; name another one, the input is never overwritten")


class WorkFolder:
    """An output folder while it is made: what is needed to go on is in its private part, mode 0700, until the end.

    Args:
        output: A new or empty folder, or one in which the same run was interrupted.
        identity: Says which run it is: settings and files.
        sources: Whose names the results have.
        report: Name of the file that says that the run is complete.

    Raises:
        InputError: If the folder holds something else, another run or a finished one.
        StorageError: If it cannot be written.
    """

    def __init__(self, output: Path, identity: Mapping[str, Any], *, sources: Sequence[Source], report: str) -> None:
        self.output, self._report = output, report
        identity = {**identity, "files": [[s.path.name, s.size, s.path.stat().st_mtime_ns] for s in sources]}
        written = (json.dumps(identity, indent=2) + "\n").encode()
        with storage_errors(output):
            if output.exists() and not output.is_dir():
                raise InputError(f"{output} is a file; name a folder")
            present = {entry.name for entry in output.iterdir()} if output.exists() else set()
        if report in present:
            if (output / _PRIVATE / _IDENTITY).exists():  # killed when all but this was done
                shutil.rmtree(output / _PRIVATE)
            raise InputError(f"{output} holds a finished run; name another folder, or remove it")
        if present and not self._is_ours(written):
            raise InputError(
                f"{output} is not empty and holds no interrupted run of this command over these files; "
                "name another folder"
            )
        self.resumed = bool(present)
        self.private = private_folder(output / _PRIVATE)
        atomic_write_bytes(self.private / _IDENTITY, written, mode=0o600)

    def _is_ours(self, written: bytes) -> bool:
        private = self.output / _PRIVATE
        try:
            return (private / _IDENTITY).read_bytes() == written
        except OSError:  # stopped before anything was kept
            return [*self.output.iterdir()] == [private] and private.is_dir() and not any(private.iterdir())

    @contextlib.contextmanager
    def discarded_if_broken(self) -> Iterator[None]:
        """Leaves nothing behind if an input file turns out to be broken: mended, it is another file."""
        try:
            yield
        except DataError:
            shutil.rmtree(self.private, ignore_errors=True)
            with contextlib.suppress(OSError):
                self.output.rmdir()
            raise

    def keep(self, name: str, content: Any) -> None:
        """Keeps a JSON value until the end, mode 0600."""
        atomic_write_bytes(self.private / name, json.dumps(content).encode(), mode=0o600)

    def kept(self, name: str) -> Any:
        """What was kept under a name, None if nothing was."""
        try:
            return json.loads((self.private / name).read_bytes())
        except FileNotFoundError:
            return None

    def finish(self, names: Sequence[str], report: Mapping[str, Any]) -> None:
        """Gives the files that were made in the private part their names, writes the report, forgets the rest.

        Raises:
            StorageError: If the disk cannot be written; the same command goes on.
        """
        with storage_errors(self.output):
            for name in names:
                with contextlib.suppress(FileNotFoundError):  # renamed before this run was interrupted
                    (self.private / name).replace(self.output / name)
        content = json.dumps(report, indent=2, ensure_ascii=False)
        atomic_write_bytes(self.output / self._report, (content + "\n").encode(errors="backslashreplace"))
        with storage_errors(self.private):
            shutil.rmtree(self.private)


class ChunkedFile:
    """A file in the making: chunks in order, and after each a line in a log of where it ended, to go on from there.

    Args:
        folder: Where to.
        name: Of the file; a text file with the same name and .log stands beside it until the end.
        head: The first bytes.
    """

    def __init__(self, folder: WorkFolder, name: str, head: bytes) -> None:
        self._path, self._log = folder.private / name, folder.private / f"{name}.log"
        self._final = folder.output / name
        self.entries = self._entries()
        if self._final.exists():
            return
        with storage_errors(self._path):
            if not self.entries:
                self._path.write_bytes(head)
            with self._path.open("r+b") as file:
                file.truncate(self.entries[-1]["end"] if self.entries else len(head))

    def _entries(self) -> list[dict[str, Any]]:
        """Complete lines of the log whose chunk is there."""
        if not self._log.exists():
            return []
        present = self._final if self._final.exists() else self._path
        size = present.stat().st_size if present.exists() else 0
        lines = [json.loads(line) for line in self._log.read_bytes().split(b"\n")[:-1]]
        kept = [line for line in lines if line["end"] <= size]
        atomic_write_bytes(self._log, b"".join(json.dumps(line).encode() + b"\n" for line in kept), mode=0o600)
        return kept

    def append(self, data: bytes, entry: Mapping[str, Any]) -> None:
        """Adds a chunk and what is to be known of it.

        Raises:
            StorageError: If the disk is full; the same command goes on.
        """
        with storage_errors(self._path):
            with self._path.open("ab") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                end = file.tell()
            self.entries.append({**entry, "end": end})
            with self._log.open("ab") as log:
                log.write(json.dumps(self.entries[-1]).encode() + b"\n")
