"""`stay`, and the service that runs it."""

from __future__ import annotations

from dataclasses import dataclass

from edge_client.ui.events.event import Address, Event, File, Lines, Words


@dataclass(frozen=True)
class WaitingForJobs(Event, event="staying"):
    """`stay` is connected, and looks for jobs from here on."""

    server: Address
    accept: Words

    template = "Waiting at {server} for jobs named {accept}"


@dataclass(frozen=True)
class JobNotAccepted(Event, event="left_alone"):
    """A job is open whose name is not one of those accepted; reported once."""

    job: str

    template = "{job} is open there too; it is none of the accepted jobs, and is left alone."


@dataclass(frozen=True)
class NotTakingPart(Event, event="no_part"):
    """Taking part in a job has failed, or was refused."""

    job: str
    why: Words
    again: Words

    template = "[yellow]No part in {job}: {why}.{again}[/yellow]"


@dataclass(frozen=True)
class ServiceWritten(Event, event="service"):
    """`install-service` has written the service's file."""

    file: File
    accept: Words
    server: Address
    data: str
    when: Words

    template = "Written to {file}\n  jobs    {accept}, at {server}\n  data    {data}\n  trains  {when}"


@dataclass(frozen=True)
class ServiceRuns(Event):
    """The service has been started; `log` is the command that shows what it reports."""

    log: str

    template = "It runs now and after every login. Its log:  {log}"


@dataclass(frozen=True)
class ServiceWaits(Event):
    """The service could not be started; `commands` start it."""

    why: Words
    commands: Lines

    template = "[yellow]It could not be started from here: {why}.[/yellow] Start it with:\n{commands}"


@dataclass(frozen=True)
class Linger(Event):
    """After installing a systemd service: how to have it run without a login."""

    template = "To have it run while nobody is logged in, too:  loginctl enable-linger"


@dataclass(frozen=True)
class Uninstalled(Event):
    """`uninstall-service` has stopped the service and removed its file."""

    file: File

    template = "Removed {file}; this machine takes part in nothing by itself now. Finished and begun jobs are kept."


@dataclass(frozen=True)
class NotInstalled(Event):
    """`uninstall-service` has found no service."""

    file: File

    template = "There is no {file}; no service takes part by itself."
