"""Which of a job's published files are wanted, and having them here."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_client import outbox
from edge_client.connection import connect
from edge_client.connection.identity import Pins
from edge_client.connection.remote import Remote, local_path
from edge_client.connection.target import Target
from edge_client.outbox import DataSource
from edge_client.proofs import manifests, signers
from edge_client.results import choose
from edge_client.results.choose import Fit
from edge_client.results.published import state_name
from edge_client.session.fetch import fetch_base
from edge_client.ui import events
from edge_client.ui.screen import Screen
from oneround import files, statements, stream, tls
from oneround.errors import BadData, NotEnough, Refused, Unreachable, UsageError
from oneround.text import human_memory, one_line
from oneround.v1 import federation_pb2 as pb

_WARNINGS = {Fit.FULL: events.MemoryFull, Fit.TIGHT: events.MemoryTight, Fit.TOO_LARGE: events.ModelTooLarge}


def publication(status: pb.JobStatus, version: int) -> pb.Publication:
    """The publication that is meant.

    Raises:
        Refused: there is none yet.
        UsageError: there is none of this version.
    """
    job = status.spec.name
    if not status.publications:
        reason = f" ({one_line(status.reason)})" if status.reason else ""
        raise Refused(f"{job} has published nothing yet; it is {state_name(status.state)}{reason}")
    versions = {publication.version: publication for publication in status.publications}
    if version and version not in versions:
        numbers = ", ".join(str(number) for number in versions)
        raise UsageError(f"{job} has no version {version}", hint=f"--version with one of: {numbers}")
    return versions[version or max(versions)]


def wanted(publication: pb.Publication, artifact: str, screen: Screen) -> Sequence[pb.Artifact]:
    """The named files; without a name the merged GGUF that is best for this machine, and why is said."""
    offered = list(publication.artifacts)
    if artifact == "all":
        return offered
    if artifact:
        chosen = [file for file in offered if file.name == artifact or file.name.startswith(f"{artifact.rstrip('/')}/")]
        if not chosen:
            raise UsageError(
                f"the publication has no {artifact!r}", hint="one of: " + ", ".join(file.name for file in offered)
            )
        return chosen
    merged = choose.merged(offered)
    if not merged:
        raise UsageError("the publication has no merged GGUF", hint="--artifact all")
    choice = choose.choose(merged, choose.this_machine())
    screen.say(
        events.ModelChosen(
            name=choice.artifact.name,
            reason=choice.reason,
            needs=human_memory(choice.needs),
            total=human_memory(choice.memory.total),
            needs_bytes=choice.needs,
            total_bytes=choice.memory.total,
            fit=choice.fit,
        )
    )
    if warning := _WARNINGS.get(choice.fit):
        screen.say(warning(human_memory(choice.memory.available)))
    return [choice.artifact]


async def check(
    remote: Remote,
    job: str,
    publication: pb.Publication,
    folder: Path,
    pins: Pins,
    screen: Screen,
    *,
    unsigned: bool = False,
) -> None:
    """Hold what is announced of a publication against the manifest that its coordinator has signed; the manifest and
    the signature are put into the folder once all is well. With `unsigned`, one that nobody signed is taken too.

    Raises:
        Refused: nobody signed it.
        BadData: it is not as it was signed, or signed by somebody else.
        UsageError: the folder has a manifest.json of something else.
    """
    announced = {file.name: file for file in publication.artifacts}
    if not {statements.MANIFEST, statements.SIGNATURE} <= announced.keys():
        if unsigned:
            screen.say(events.Unsigned(publication.version))
            return
        raise Refused(
            f"v{publication.version} of {job} is not signed: an earlier version of oneround published it, or somebody "
            "took the signature away",
            hint=f"`coordinator publish {job}`, over there, makes a signed one; edge-client pull --unsigned takes this",
        )
    text = await remote.read(job, announced[statements.MANIFEST], manifests.MOST_BYTES)
    signature = await remote.read(job, announced[statements.SIGNATURE], manifests.MOST_SIGNATURE_BYTES)
    signed = manifests.read(text, signature, f"the manifest of v{publication.version}")
    if not remote.certificate:
        screen.say(events.SignedByAnyone(publication.version))
    elif signed.signer not in signers.connected(pins, remote.certificate):
        raise BadData(
            f"v{publication.version} of {job} is signed with another key than this coordinator's: "
            f"{tls.grouped(signed.signer)}",
            hint=f"`coordinator publish {job}`, over there, makes a version that is signed with its key of today",
        )
    manifests.check(signed.manifest, job, publication)
    await asyncio.to_thread(_keep, folder, {statements.MANIFEST: text, statements.SIGNATURE: signature})
    screen.say(events.Signed(publication.version, tls.grouped(signed.signer)))


async def fetch(
    remote: Remote, job: str, artifacts: Sequence[pb.Artifact], folder: Path, screen: Screen
) -> Sequence[Path]:
    """Have these files in a folder; those that are there already, whole, are not fetched again.

    Raises:
        BadData: one of them has no place in a folder of ours. Then none is fetched.
    """
    if not stream.are_apart(artifacts):
        raise BadData(f"two files that the coordinator has published for {job} have one name")
    fetched = []
    for artifact, file in [(artifact, local_path(folder, artifact)) for artifact in artifacts]:
        if not await asyncio.to_thread(_is_here, file, artifact):
            with screen.bar(artifact.name, artifact.size) as advance:
                await remote.download(job, artifact, file, advance)
        screen.say(events.Pulled(artifact.name, artifact.size))
        fetched.append(file)
    return fetched


async def fetch_model(
    remote: Remote, job: str, version: int, state: Path, screen: Screen
) -> tuple[Path, pb.Publication]:
    """The best published model for this machine, kept in the state folder."""
    published = publication(await remote.job(job), version)
    folder = outbox.published_folder(state, job) / f"v{published.version}"
    await check(remote, job, published, folder, Pins(state), screen)
    local = outbox.published_here(state, job, published.version)
    for artifact in choose.merged(published.artifacts):
        if local is not None and artifact.name == local.name and await asyncio.to_thread(_is_here, local, artifact):
            return local, published
    (file,) = await fetch(remote, job, wanted(published, "", screen), folder, screen)
    return file, published


def _keep(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Not over a manifest.json that is none of ours."""
    if (folder / statements.MANIFEST).exists() and not (folder / statements.SIGNATURE).exists():
        raise UsageError(
            f"{folder} has a {statements.MANIFEST} of something else, which is left alone", hint="--to another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.replace(folder / name, [content])


def _is_here(file: Path, artifact: pb.Artifact) -> bool:
    return file.is_file() and stream.digest(file) == artifact.digest


def model_file(model: str, version: int, target: Target, state: Path, screen: Screen) -> Path:
    """A GGUF file that is here, or a job's published model, fetched if it is not."""
    if Path(model).is_file():
        return Path(model)
    local = outbox.published_here(state, model, version)
    if local is not None:
        return local

    async def run() -> Path:
        async with connect.connected(target, state, screen, model) as remote:
            return (await fetch_model(remote, model, version, state, screen))[0]

    return asyncio.run(run())


async def to_measure(
    target: Target,
    state: Path,
    screen: Screen,
    job: pb.Job,
    source: DataSource,
    version: int,
    *,
    must: bool,
) -> tuple[Path, Path, int]:
    """The base's folder, the published model and its version; without a coordinator what is here, unless it `must` be
    reached anyway."""
    name, model = job.spec.name, Path(source.model) if source.model else None
    try:
        async with connect.connected(target, state, screen, name) as remote:
            file, published = await fetch_model(remote, name, version, state, screen)
            return await fetch_base(remote, job, state, model, screen), file, published.version
    except (Unreachable, NotEnough) as error:
        base = model or outbox.model_folder(state, job)
        local = outbox.published_here(state, name, version)
        if must or local is None or not all(local_path(base, file).is_file() for file in job.base_files):
            raise
        number = int(local.parent.name.removeprefix("v"))
        screen.say(events.MeasuredOffline(str(error).splitlines()[0], number))
        return base, local, number
