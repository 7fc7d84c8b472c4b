"""What `coordinator show` prints."""

import io

from rich.console import Console

from coordinator.cli import tables
from oneround.v1 import federation_pb2 as pb


def test_a_withheld_file_is_told_with_its_reason() -> None:
    publication = pb.Publication(version=2, folder="/state/publications/notes/v2")
    publication.artifacts.add(name="notes-f16.gguf", size=10_000_000)
    publication.withheld.add(name="notes-q4_k_m.gguf", reason="mean divergence from f16 is 0.7, over 0.25")
    status = pb.JobStatus(spec=pb.JobSpec(name="notes"), state=pb.STATE_PUBLISHED, publications=[publication])
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(tables.job(status))
    text = console.export_text()
    assert "notes-f16.gguf  10.0 MB" in text
    assert "notes-q4_k_m.gguf is withheld, in /state/publications/notes/v2.withheld: mean divergence" in text
