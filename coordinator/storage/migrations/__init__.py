"""The schema's history, one step a file in versions/, applied by Alembic whenever the daemon starts."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect

from oneround.errors import UsageError


def upgrade(connection: Connection) -> None:
    """Bring a database to this version's schema, within the connection's transaction.

    Raises:
        UsageError: the database was written by a newer version, or is not ours.
    """
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.attributes["connection"] = connection
    script = ScriptDirectory.from_config(config)
    revision = MigrationContext.configure(connection).get_current_revision()
    if revision == script.get_current_head():
        return
    if revision is not None and revision not in {step.revision for step in script.walk_revisions()}:
        raise UsageError(
            f"the database has schema {revision}, which this version of oneround does not know",
            hint="pip install --upgrade oneround",
        )
    if revision is None and "jobs" in inspect(connection).get_table_names():
        raise UsageError(
            "the database was written before oneround 0.1, or is not a coordinator's",
            hint="coordinator serve --state NEW-FOLDER",
        )
    command.upgrade(config, "head")
