"""What a publication holds: parts, each made by an exporter of the same material and proved by a verifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from converters.adapter import Adapter
from converters.architectures import Base
from converters.gguf.quantize import Quantised
from oneround.v1 import federation_pb2 as pb

Report = Callable[[str], None]  # is told what is being done, in some words


@dataclass(frozen=True)
class Material:
    """What exporters make their parts of."""

    spec: pb.JobSpec
    update: Adapter  # of all contributions
    base: Base
    base_gguf: Path


@dataclass(frozen=True)
class Part:
    """A file or folder at the top of a publication."""

    exporter: str
    path: Path
    about: str  # what it is for, as the model card says
    kind: str = ""  # of a merged GGUF: its type
    released: bool = True  # else it serves to make and to check others, and goes when they are done
    quantised: Quantised | None = None

    @property
    def name(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class Exporter:
    """Makes parts of one kind, none where a job asks for none.

    `export` is given the material, the folder to write into, and the parts that exporters before it made. It writes
    each file atomically (oneround.files), the same material always to the same bytes.

    Raises:
        BadData: the material has no place in the format.
        NotEnough: the disk is full.
    """

    name: str
    export: Callable[[Material, Path, Sequence[Part], Report], Sequence[Part]]
