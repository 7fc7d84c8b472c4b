"""The first schema."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "jobs",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("job", sa.Text, nullable=False),
        sa.Column("base_folder", sa.String, nullable=False),
        sa.Column("opened", sa.Double, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("closed_at", sa.Double),
        sa.Column("tried_at", sa.Double, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
    )
    op.create_table(
        "clients",
        sa.Column("job", sa.String, sa.ForeignKey("jobs.name"), primary_key=True),
        sa.Column("client_id", sa.String, primary_key=True),
        sa.Column("lease", sa.String, nullable=False, unique=True),
        sa.Column("name", sa.String, nullable=False),
        sa.Column("machine", sa.Text, nullable=False),
        sa.Column("withdrawn", sa.Boolean, nullable=False),
        sa.Column("last_seen", sa.Double, nullable=False),
        sa.Column("step", sa.BigInteger, nullable=False),
        sa.Column("total_steps", sa.BigInteger, nullable=False),
        sa.Column("loss", sa.Double, nullable=False),
        sa.Column("tokens_per_second", sa.Double, nullable=False),
    )
    op.create_table(
        "contributions",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("client_id", sa.String, primary_key=True),
        sa.Column("revision", sa.Integer, primary_key=True),
        sa.Column("replaced", sa.Boolean, nullable=False),
        sa.Column("digest", sa.String, nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("received", sa.Double, nullable=False),
        sa.Column("declaration", sa.Text, nullable=False),
        sa.Column("standing", sa.String, nullable=False),
        sa.Column("verdict", sa.String, nullable=False),
        sa.Column("reason", sa.String, nullable=False),
        sa.Column("by_hand", sa.String, nullable=False),
        sa.Column("may_replace", sa.Boolean, nullable=False),
        sa.Column("considered", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["job", "client_id"], ["clients.job", "clients.client_id"]),
    )
    op.create_index("contributions_by_digest", "contributions", ["digest"])
    op.create_table(
        "publications",
        sa.Column("job", sa.String, sa.ForeignKey("jobs.name"), primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("request", sa.Text, nullable=False),
        sa.Column("at_least", sa.Integer, nullable=False),
        sa.Column("publication", sa.Text),
    )


def downgrade() -> None:
    for table in ("publications", "contributions", "clients", "jobs"):
        op.drop_table(table)
