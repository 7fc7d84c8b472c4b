"""What Alembic runs for every command; `connection` is given by `coordinator.storage.migrations.upgrade`."""

from alembic import context

from coordinator.storage.schema import Table

context.configure(connection=context.config.attributes["connection"], target_metadata=Table.metadata)
with context.begin_transaction():
    context.run_migrations()
