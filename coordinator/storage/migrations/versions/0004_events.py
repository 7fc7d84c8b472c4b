"""What happened in a round, in order."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "events",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("kind", sa.String, nullable=False),
        sa.Column("client_id", sa.String, nullable=False),
        sa.Column("once", sa.String),
        sa.Column("event", sa.Text, nullable=False),
        sa.ForeignKeyConstraint(["job"], ["jobs.name"]),
        sa.UniqueConstraint("job", "once", name="events_once"),
    )


def downgrade() -> None:
    op.drop_table("events")
