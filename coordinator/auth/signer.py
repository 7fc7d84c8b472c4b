"""What the coordinator vouches for with its key: that a contribution is safe, and what a publication is."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format

from coordinator.storage.schema import Contribution
from coordinator.storage.store import Store
from oneround import files, statements, stream
from oneround.signing import PrivateKey
from oneround.v1 import federation_pb2 as pb


class Signer:
    """Signs with the key that clients have pinned. Only the daemon has it: the publisher, which reads strangers' files,
    does not get it."""

    def __init__(self, key: PrivateKey, store: Store) -> None:
        self._key = key
        self._store = store

    def receipt(self, contribution: Contribution) -> pb.Receipt:
        """The coordinator's word for a contribution that is committed; the same one whenever it is asked for."""
        receipt = pb.Receipt(
            job=contribution.job,
            job_id=self._store.announced(contribution.job).job.id,
            client_id=contribution.client_id,
            digest=contribution.digest,
            size=contribution.size,
            received_unix=contribution.received,
        )
        receipt.signature.CopyFrom(statements.sign(self._key, statements.receipt(receipt)))
        return receipt

    def manifest(self, folder: Path) -> Path:
        """Sign the manifest of a publication that stands in a folder; returns the signature's file, beside it.

        Raises:
            NotEnough: the disk is full.
        """
        statement = statements.manifest(stream.digest(folder / statements.MANIFEST))
        signature = json_format.MessageToJson(statements.sign(self._key, statement), preserving_proto_field_name=True)
        files.replace(folder / statements.SIGNATURE, [f"{signature}\n".encode()])
        return folder / statements.SIGNATURE
