"""What clients report of publications."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "evaluations",
        sa.Column("job", sa.String, primary_key=True),
        sa.Column("client_id", sa.String, primary_key=True),
        sa.Column("version", sa.Integer, primary_key=True),
        sa.Column("evaluation", sa.Text, nullable=False),
        sa.Column("received", sa.Double, nullable=False),
        sa.ForeignKeyConstraint(["job", "client_id"], ["clients.job", "clients.client_id"]),
    )


def downgrade() -> None:
    op.drop_table("evaluations")
