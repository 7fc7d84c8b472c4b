"""The schema's history, a backup and its return, and PostgreSQL in SQLite's place."""

import asyncio
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text

from coordinator.jobs import spec
from coordinator.storage import backup, migrations
from coordinator.storage.database import engine
from coordinator.storage.schema import Table
from coordinator.storage.store import Store
from edge_client.connection.identity import Pins
from edge_client.results import pull
from edge_client.ui.screen import Screen
from oneround.errors import BadData, Unreachable, UsageError
from oneround.v1 import federation_pb2 as pb
from tests.daemons import (
    SPEC,
    nothing,
    served,
    two_contribute,
    version,
)


def difference(url: str) -> list[object]:
    """Between what the migrations make and what schema.py says."""
    opened = engine(url)
    with opened.execution_options(writes=True).begin() as connection:
        migrations.upgrade(connection)
        migrations.upgrade(connection)  # nothing more to do
        found = compare_metadata(MigrationContext.configure(connection), Table.metadata)
    opened.dispose()
    return found


def test_the_migrations_make_the_schema(tmp_path: Path) -> None:
    assert difference(f"sqlite:///{tmp_path}/new.sqlite") == []


def test_a_database_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    newer, other = f"sqlite:///{tmp_path}/newer.sqlite", f"sqlite:///{tmp_path}/other.sqlite"
    Store(newer).close()
    for url, statement, says in [
        (newer, "UPDATE alembic_version SET version_num = '9999'", "schema 9999"),
        (other, "CREATE TABLE jobs (name TEXT)", "not a coordinator's"),
    ]:
        opened = engine(url)
        with opened.execution_options(writes=True).begin() as connection:
            connection.execute(text(statement))
        opened.dispose()
        with pytest.raises(UsageError, match=says):
            Store(url)


async def test_a_backup_of_a_running_daemon_comes_back(tmp_path: Path) -> None:
    state, kept, again = tmp_path / "state", tmp_path / "kept", tmp_path / "again"

    async with served(state) as (daemon, remote):
        await two_contribute(remote, tmp_path)
        early = await asyncio.to_thread(backup.backup, state, kept)
        assert (early.jobs, early.files) == (1, 1 + 2 + 4), "the initial adapter, the contributions, the identity"
        await daemon.operator.close("notes")
        await version(daemon, 1, "notes")
        late = await asyncio.to_thread(backup.backup, state, kept)
        published = [file for file in (state / "publications" / "notes" / "v1").rglob("*") if file.is_file()]
        assert late.files == len(published) + 4, "what was there is not copied again"
    with pytest.raises(UsageError, match="already"):
        backup.restore(kept, state)
    backup.restore(kept, again)
    assert (again / "key.pem").read_bytes() == (state / "key.pem").read_bytes(), "clients know it again"
    assert (again / "key.pem").stat().st_mode & 0o077 == 0 and kept.stat().st_mode & 0o077 == 0
    async with served(again) as (daemon, remote):
        status = await daemon.operator.status("notes")
        assert (status.admitted, status.state) == (2, pb.STATE_PUBLISHED)
        (publication,) = status.publications
        assert publication.folder == str(again / "publications" / "notes" / "v1")
        for artifact in publication.artifacts:
            await remote.download("notes", artifact, tmp_path / "pulled" / artifact.name, nothing)
        await pull.check(remote, "notes", publication, tmp_path / "pulled", Pins(again), Screen())
        await daemon.operator.publish(pb.PublishRequest(job="notes"))  # the contributions are there too
        await version(daemon, 2, "notes")


async def test_a_backup_that_is_not_whole(tmp_path: Path) -> None:
    state, kept = tmp_path / "state", tmp_path / "kept"

    with pytest.raises(UsageError, match="no coordinator has run"):
        backup.backup(tmp_path / "nothing", kept)
    with pytest.raises(UsageError, match="not a whole backup"):
        backup.restore(tmp_path, tmp_path / "new")
    async with served(state) as (_, remote):
        await two_contribute(remote, tmp_path)
    backup.backup(state, kept)
    blob = max((kept / "blobs").iterdir(), key=lambda file: file.stat().st_size)
    blob.write_bytes(b"\0" * blob.stat().st_size)
    with pytest.raises(BadData, match="missing or damaged"):
        backup.restore(kept, tmp_path / "new")
    assert not (tmp_path / "new" / "coordinator.sqlite").exists()


@pytest.mark.postgres
async def test_postgresql(tmp_path: Path, postgres: str) -> None:
    assert difference(postgres) == []
    state, kept, again = tmp_path / "state", tmp_path / "kept", tmp_path / "again"

    async def goes_on(state: Path, database: str = "") -> None:
        async with served(state, database=database) as (daemon, _):
            assert (await daemon.operator.status("notes")).admitted == 2
            await daemon.operator.publish(pb.PublishRequest(job="notes"))
            await version(daemon, 2, "notes")
            await daemon.operator.delete("notes")

    async with served(state, database=postgres) as (daemon, remote):
        await two_contribute(remote, tmp_path)
        await daemon.operator.submit(spec.parse(SPEC))  # again, which changes nothing
        await daemon.operator.close("notes")
        await version(daemon, 1, "notes")
        await asyncio.to_thread(backup.backup, state, kept, postgres)
    assert not (state / "coordinator.sqlite").exists()
    backup.restore(kept, again)  # from PostgreSQL into SQLite
    await goes_on(again)
    await goes_on(state, postgres)
    backup.restore(kept, tmp_path / "third", postgres)  # and back, now that it is empty
    await goes_on(tmp_path / "third", postgres)
    with pytest.raises(Unreachable, match="does not answer"):
        Store(postgres.replace("@127.0.0.1:", "@127.0.0.1:1"))
