"""Using what was published: `pull`, `evaluate` and `serve`."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Bytes, Event, File, Fingerprint, Folder, Nats, Words


@dataclass(frozen=True)
class Signed(Event):
    """The manifest of a publication carries the signature of the coordinator's pinned key."""

    version: int
    fingerprint: Fingerprint

    template = "v{version}, as the coordinator signed it"


@dataclass(frozen=True)
class SignedByAnyone(Event):
    """A manifest is signed, but came without TLS; `signed` follows."""

    version: int

    template = "[yellow]v{version} is as it was signed; without TLS nothing shows whose key that was.[/yellow]"


@dataclass(frozen=True)
class Unsigned(Event):
    """A version without a signature is taken, as `--unsigned` asks."""

    version: int

    template = "[yellow]v{version} is not signed: nothing shows that it is what the coordinator published.[/yellow]"


@dataclass(frozen=True)
class ModelChosen(Event, event="chosen"):
    """Which merged model suits this machine, and why. `fit` is comfortable, full, tight or too_large."""

    name: str
    reason: Words
    needs: Words
    total: Words
    needs_bytes: Bytes
    total_bytes: Bytes
    fit: str

    template = "Taking {name}, {reason}: it needs about {needs} of this machine's {total} to run."


@dataclass(frozen=True)
class MemoryFull(Event, event="full"):
    """The chosen model fits this machine, but not beside what is open now."""

    available: Words

    template = "[yellow]Only {available} of memory are free now: close something before you run it.[/yellow]"


@dataclass(frozen=True)
class MemoryTight(Event, event="tight"):
    """The chosen model takes more than half of this machine's memory."""

    available: Words

    template = "[yellow]That is more than half of its memory: it will be slow, or end what else is open.[/yellow]"


@dataclass(frozen=True)
class ModelTooLarge(Event, event="too_large"):
    """The chosen model takes more memory than this machine has."""

    available: Words

    template = "[yellow]That is more than there is: it will hardly run here.[/yellow]"


@dataclass(frozen=True)
class Pulled(Event):
    """A file of a publication is here, whole."""

    name: str
    size: Bytes

    template = "{name}  {size:,} bytes"


@dataclass(frozen=True)
class PulledInto(Event, event="folder"):
    """`pull` is done."""

    folder: Folder

    template = "In {folder}"


@dataclass(frozen=True)
class BaseConverted(Event, event="base_gguf"):
    """`evaluate` is about to make a GGUF of the base, once."""

    file: File

    template = "Turning the base into a GGUF, once: {file}"


@dataclass(frozen=True)
class MeasuredOffline(Event, event="offline"):
    """No coordinator answers, and a version is here that can be measured."""

    why: Words
    version: int

    template = "[yellow]{why}. Measuring v{version}, which is here.[/yellow]"


@dataclass(frozen=True)
class Measuring(Event):
    """`evaluate` begins to measure."""

    models: int
    examples: int
    tokens: int

    template = "Measuring {models} models on {examples} held-out examples, {tokens:,} target tokens, with llama.cpp"


@dataclass(frozen=True)
class ModelLoss:
    """Of one model, on this machine's held-out data."""

    loss: Nats
    perplexity: float


@dataclass(frozen=True)
class LossDifference:
    """The published model's loss minus another's; null where there is a single example."""

    loss: Nats
    standard_error: Nats | None


@dataclass(frozen=True)
class PublishedMinus:
    """The published model compared with the two others."""

    base: LossDifference
    own: LossDifference


@dataclass(frozen=True)
class Evaluated(Event):
    """What `evaluate` has measured. `helped` is null where chance could explain the difference."""

    sentence: str
    helped: bool | None
    job: str
    version: int
    file: File
    tokens: int
    examples: int
    base: ModelLoss
    own: ModelLoss
    published: ModelLoss
    published_minus: PublishedMinus

    template = "{sentence}"


@dataclass(frozen=True)
class LossesReported(Event, event="tells"):
    """With `--report`: all that the coordinator is about to be told."""

    version: int
    base_loss: Nats
    own_loss: Nats
    published_loss: Nats
    tokens: int

    template = (
        "Of this the coordinator is told five numbers and nothing else: base {base_loss:.4f}, own {own_loss:.4f}, "
        "published {published_loss:.4f} nats per token, over {tokens:,} tokens, for v{version}."
    )


@dataclass(frozen=True)
class ReportReceived(Event, event="told"):
    """The coordinator has the report."""

    job: str

    template = "Told. `coordinator show {job}`, over there, puts it beside the others'."


@dataclass(frozen=True)
class Serving(Event):
    """`serve` listens, and answers until it is ended."""

    model: str
    url: str
    has_chat_template: bool

    template = "Serving {model} at {url} until Ctrl-C"
