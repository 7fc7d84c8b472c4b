"""A copy of everything that is known, taken while the daemon runs, and brought back.

    FOLDER/coordinator.sqlite   every row, as of one moment; written last, so a folder that has it is whole
    FOLDER/blobs/DIGEST         contributions and initial adapters
    FOLDER/publications/        every version
    FOLDER/key.pem, …           the coordinator's identity, without which clients would not know it again

Rows go through SQLAlchemy into a fresh SQLite file, from whatever database and into whatever database, so a backup is
also the way from SQLite to PostgreSQL. Blobs and versions never change, so a second backup takes only what is new.
Uploads that are under way are not in it: their clients send them again.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import URL, Connection, select

from coordinator.storage import migrations
from coordinator.storage.blobs import Blobs
from coordinator.storage.database import engine
from coordinator.storage.schema import Table
from coordinator.storage.store import Store
from oneround import command, files, stream
from oneround.errors import BadData, UsageError

_SECRET = "session-secret"  # a coordinator that has not run since there are sessions has none
_IDENTITY = ("key.pem", "certificate.pem", "admin-token", _SECRET)
_ROWS = "coordinator.sqlite"
_AT_A_TIME = 500  # rows


@dataclass
class BackupSummary:
    """What was copied."""

    jobs: int = 0
    files: int = 0
    bytes: int = 0


def backup(state: Path, folder: Path, database: str = "", blobs: str = "") -> BackupSummary:
    """Copy a coordinator's state to a folder.

    Raises:
        UsageError: there is no coordinator's state.
        BadData: a file went while it was copied, since its job was deleted; run it again.
    """
    source = database or _sqlite(state / _ROWS)
    if not database and not (state / _ROWS).exists():
        raise UsageError(f"no coordinator has run over {state}", hint="--state DIR")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)  # it holds the coordinator's key
    partial = folder / f".{_ROWS}.partial"
    partial.unlink(missing_ok=True)
    _copy_rows(source, _sqlite(partial))
    done, store = BackupSummary(), Store(_sqlite(partial))
    try:
        done.jobs = len(store.names())
        stored = Blobs(state, blobs)
        for digest in sorted(store.digests()):
            _copy(stored.path(digest), folder / "blobs" / digest, done)
        for file in _published(store, state):
            _copy(file, folder / file.relative_to(state), done)
        for name in _IDENTITY:
            (folder / name).unlink(missing_ok=True)
            if name != _SECRET or (state / name).exists():
                _copy(state / name, folder / name, done)
    except FileNotFoundError as error:
        raise BadData(
            f"{error.filename} disappeared while the backup copied it", hint="run the backup again"
        ) from error
    finally:
        store.close()
    for leftover in folder.glob(f".{_ROWS}.partial-*"):  # SQLite's own, empty once it is closed
        leftover.unlink()
    with partial.open("rb+") as written:
        files.sync(written)
    partial.replace(folder / _ROWS)
    files.sync_folder(folder)
    return done


def restore(folder: Path, state: Path, database: str = "", blobs: str = "") -> BackupSummary:
    """Bring a backup back into an empty state folder, and, with `database`, into an empty database.

    Raises:
        UsageError: this is no backup, or there is something already.
        BadData: a contribution is damaged.
    """
    if not (folder / _ROWS).exists():
        raise UsageError(f"{folder} is not a whole backup: it has no {_ROWS}", hint="coordinator backup FOLDER")
    if (state / _ROWS).exists():
        raise UsageError(f"{state} already holds a coordinator's state", hint="--state NEW-FOLDER")
    state.mkdir(parents=True, exist_ok=True)
    with command.only_one(state, "coordinator"):
        done, stored = BackupSummary(), Blobs(state, blobs)
        partial = state / f".{_ROWS}.partial"
        shutil.copy(folder / _ROWS, partial)
        store = Store(_sqlite(partial))
        try:
            done.jobs = len(store.names())
            for digest in sorted(store.digests()):
                file = folder / "blobs" / digest
                if not file.is_file() or stream.digest(file) != digest:
                    raise BadData(f"{file} is missing or damaged", hint="restore from another backup")
                copied = stored.uploads / digest
                _copy(file, copied, done)
                stored.put(copied, digest)
                copied.unlink()
            for file in _published(store, folder):
                _copy(file, state / file.relative_to(folder), done)
            for name in _IDENTITY:
                if name != _SECRET or (folder / name).exists():
                    _copy(folder / name, state / name, done)
        finally:
            store.close()
        if database:
            _copy_rows(_sqlite(partial), database)
            partial.unlink()
        else:
            with partial.open("rb+") as written:
                files.sync(written)
            partial.replace(state / _ROWS)
            files.sync_folder(state)
    return done


def _sqlite(file: Path) -> URL:
    return URL.create("sqlite", database=str(file))


def _published(store: Store, state: Path) -> Iterator[Path]:
    """Every file of every version, and what was withheld of it."""
    for name in store.names():
        for publication in store.publications(name):
            folder = state / "publications" / name / f"v{publication.version}"
            yield from (file for file in sorted(folder.rglob("*")) if file.is_file())
            yield from (file for file in sorted(folder.with_name(f"{folder.name}.withheld").glob("*")))


def _copy(file: Path, to: Path, done: BackupSummary) -> None:
    """A file that never changes: one of the same size is taken to be there already."""
    if to.exists() and to.stat().st_size == file.stat().st_size:
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    partial = to.with_name(f".{to.name}.partial")
    shutil.copy(file, partial)
    with partial.open("rb+") as copied:
        files.sync(copied)
    partial.replace(to)
    files.sync_folder(to.parent)
    done.files, done.bytes = done.files + 1, done.bytes + to.stat().st_size


def _copy_rows(source: str | URL, target: str | URL) -> None:
    """Every row of every table, as of one moment."""
    with _connected(source, write=False) as reading, _connected(target, write=True) as writing:
        migrations.upgrade(writing)
        for table in Table.metadata.sorted_tables:
            if writing.execute(select(table).limit(1)).first() is not None:
                raise UsageError(f"the database has rows in {table.name} already", hint="give an empty one")
            rows = reading.execution_options(stream_results=True).execute(select(table)).mappings()
            for some in rows.partitions(_AT_A_TIME):
                writing.execute(table.insert(), [dict(row) for row in some])


@contextmanager
def _connected(url: str | URL, *, write: bool) -> Iterator[Connection]:
    opened = engine(url)
    if opened.dialect.name != "sqlite" and not write:
        opened = opened.execution_options(isolation_level="REPEATABLE READ")  # one moment for all tables
    try:
        with opened.execution_options(writes=write).begin() as connection:
            yield connection
    finally:
        opened.dispose()
