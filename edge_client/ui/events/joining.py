"""What a person agrees to, and joining."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Address, Event, Words

_LEAVES = (
    "  to join    {to_join}\n"
    "  meanwhile  {meanwhile}\n"
    "  at last    {at_last}\n"
    "The files stay here. The adapter is what was learnt from them. No program comes with a job or its base."
)


@dataclass(frozen=True)
class JobTerms(Event, event="terms"):
    """Before a person agrees to take part in a job: what the job asks for, and all that will leave this machine."""

    job: str
    to_join: Words
    meanwhile: Words
    at_last: Words
    base: Words
    trains: Words
    takes: Words
    server: Address
    key: Words
    until: str
    data: str

    template = (
        "\nJob [bold]{job}[/bold], open until {until}\n"
        "  at         {server}, key {key}\n"
        "  base       {base}\n"
        "  data       {data}\n"
        "  trains     {trains}\n"
        "  takes      {takes}\n"
        "What leaves this machine, and nothing else:\n" + _LEAVES
    )


@dataclass(frozen=True)
class StandingTerms(Event, event="standing"):
    """Before a person agrees to `stay`: the same for every job of the accepted names."""

    accept: Words
    server: Words
    data: str
    to_join: Words
    meanwhile: Words
    at_last: Words

    template = (
        "\nEvery job named {accept}, at {server}\n"
        "  data       {data}\n"
        "  trains     a LoRA as each job says, over its base model, which comes from the coordinator\n"
        "What leaves this machine for each of them, and nothing else:\n" + _LEAVES
    )


@dataclass(frozen=True)
class Declined(Event):
    """The person did not agree. The command exits with 3."""

    template = "Nothing was sent. All that the coordinator has seen is this machine's network address and public key."


@dataclass(frozen=True)
class ApprovalAwaited(Event, event="asks"):
    """The operator has to let this machine in first."""

    job: str
    id: str
    name: str

    template = (
        "Asked to take part in [bold]{job}[/bold]. The operator lets this machine in by\n"
        "  coordinator clients approve {id} --job {job}"
    )


@dataclass(frozen=True)
class Joined(Event):
    """This machine has joined a job, now or before."""

    job: str
    server: Address
    client: str

    template = "Joined [bold]{job}[/bold] at {server} as {client}"


@dataclass(frozen=True)
class Left(Event):
    """`leave` has withdrawn this machine's contribution."""

    job: str

    template = "Left {job}. What you sent is left out of everything published from now on; your files here stay."
