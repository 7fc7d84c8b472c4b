"""`edge-client`: take part in a job, and use what comes of it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import platformdirs
import typer
from rich import box as boxes
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from converters import command, llama
from converters.errors import BadData, NotEnough, Refused, Unreachable, UsageError
from edge_client import backends, consent, discovery, identity, local_model, outbox, patience, reach, session
from edge_client.remote import Remote, local_path
from edge_client.screen import Screen
from oneround import stream, tls
from oneround.v1 import federation_pb2 as pb

app = typer.Typer(
    pretty_exceptions_enable=False,
    help="Fine-tune a shared model on files that stay on this machine; send one adapter; use the result.",
    epilog="Example: edge-client join --server host:50051 --data notes/",
    no_args_is_help=True,
)

_DEFAULT_STATE = Path(platformdirs.user_data_dir("oneround")) / "client"
State = Annotated[Path, typer.Option("--state", help="Where jobs are kept.", show_default="the user's data folder")]
Server = Annotated[
    str,
    typer.Option(
        "--server",
        help="The coordinator's HOST:PORT. Left out: the last one joined, or the one on this network.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON, for scripts.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="No TLS; for a coordinator on this machine.")]


@app.command(epilog="Example: edge-client join --server host:50051 --data notes/")
def join(
    server: Server = "",
    job: Annotated[str, typer.Option(help="The job; not needed when only one is open.")] = "",
    data: Annotated[Path, typer.Option(help="A file or folder: .jsonl, .json, .parquet or .txt.")] = Path("data"),
    backend: Annotated[str, typer.Option(help="auto, torch or mlx.")] = "auto",
    model: Annotated[Path | None, typer.Option(help="The base model's folder, if it is on this machine.")] = None,
    name: Annotated[str, typer.Option(help="What others see.", show_default="this machine's name")] = "",
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Skip and count rows that cannot be used.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(help="Seconds after which it is kept how far training is.", min=0)
    ] = session.SAVE_SECONDS,
    again: Annotated[
        bool, typer.Option("--again", help="Train anew and replace what was sent, where the operator allows it.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Stay until the result is published.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Agree to what will be sent, without being asked; for scripts.")
    ] = False,
    state: State = _DEFAULT_STATE,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Take part in a job, start to receipt. Run it again after any interruption, and it goes on."""
    screen = Screen(as_json)
    _make(state)
    waiting = any(box.trained() and not box.receipt() for box in outbox.all_outboxes(state))
    if not waiting and not data.exists():  # what is trained needs no data any more
        raise BadData(f"there is no data at {data}", hint="edge-client join --data FILE_OR_FOLDER")
    with screen.busy("loading the training backend"):
        chosen = backends.choose(backend)
    taker = session.Taker(
        state=state,
        client_id=identity.client_id(state),
        name=name or socket.gethostname(),
        data=data,
        backend=chosen,
        model=model,
        skip_bad_rows=skip_bad_rows,
        save_every=save_every,
        again=again,
    )

    async def run() -> None:
        async with reach.connected(server, state, screen, insecure) as remote:
            with command.only_one(state, "edge-client join"):
                wanted = consent.meant(await remote.jobs(), job)
                name, key = wanted.spec.name, identity.Pins(state).all().get(remote.server, "")
                terms = consent.terms(wanted, taker.request(name), "" if insecure else key)
                if not consent.given(outbox.all_outboxes(state), terms) and not await consent.ask(
                    screen,
                    terms,
                    server=remote.server,
                    base=wanted.spec.model.base,
                    deadline=wanted.deadline_unix,
                    data=data,
                    yes=yes,
                ):
                    screen.say("declined")
                    raise typer.Exit(Refused.exit_code)
                receipt = await session.take_part(remote, name, replace(taker, consent=terms.digest), screen)
            if wait:
                joined = outbox.find(state, receipt.job).joined()
                assert joined is not None, "find looks at joined jobs"
                deadline = joined.job.deadline_unix
                await patience.through(
                    remote, deadline, screen, lambda _: _until_published(remote, receipt.job, screen)
                )

    asyncio.run(run())


@app.command(epilog="Example: edge-client discover")
def discover(
    seconds: Annotated[float, typer.Option(help="How long to listen.", min=0.1, max=600)] = discovery.LOOK_SECONDS,
    state: State = _DEFAULT_STATE,
    as_json: Json = False,
) -> None:
    """The coordinators that make themselves known on this network."""
    with Screen(as_json).busy("listening to this network"):
        found = asyncio.run(discovery.look(seconds))
    pinned = set(identity.Pins(state).all().values())
    if as_json:
        rows = [{**asdict(each), "known": each.fingerprint in pinned} for each in found]
        print(json.dumps(rows, indent=2))
        return
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if not found:
        out.print(
            "No coordinator makes itself known on this network. One elsewhere: edge-client join --server HOST:PORT"
        )
        return
    table = Table(box=boxes.SIMPLE_HEAD)
    for heading in ("name", "address", "known here", "key fingerprint"):
        table.add_column(heading)
    for each in found:
        known = "yes" if each.fingerprint in pinned else "no"
        table.add_row(escape(each.name), "\n".join(each.addresses), known, tls.grouped(each.fingerprint))
    out.print(table)
    out.print("Compare the fingerprint with the one that `coordinator serve` printed; anybody can use a name.")


@app.command(epilog="Example: edge-client status")
def status(state: State = _DEFAULT_STATE, as_json: Json = False) -> None:
    """The jobs that this machine has joined, and how far each is."""
    boxes_ = outbox.all_outboxes(state)
    rows = []
    for box in boxes_:
        joined, trained, receipt = box.joined(), box.trained(), box.receipt()
        assert joined is not None, "all_outboxes lists joined jobs"
        stage = "contributed" if receipt else "trained, not sent" if trained else "joined, not trained"
        rows.append(
            {
                "job": joined.job.spec.name,
                "server": box.server(),
                "stage": stage,
                "examples": trained.num_examples if trained else None,
                "bytes": receipt.size if receipt else None,
                "folder": str(box.folder),
            }
        )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    out = Console(highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)
    if not rows:
        out.print("No job joined yet. Start with:  edge-client join --server HOST:PORT --data FILE_OR_FOLDER")
        return
    table = Table(box=boxes.SIMPLE_HEAD)
    for heading in ("job", "server", "stage", "examples", "sent"):
        table.add_column(heading)
    for row in rows:
        sent = f"{row['bytes']:,} bytes" if row["bytes"] else ""
        table.add_row(str(row["job"]), str(row["server"]), str(row["stage"]), str(row["examples"] or ""), sent)
    out.print(table)


@app.command(epilog="Example: edge-client pull clinic-notes --artifact peft --to out/")
def pull(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    artifact: Annotated[
        str, typer.Option(help="A file or folder of the publication, or `all`. Left out: the smallest merged GGUF.")
    ] = "",
    to: Annotated[Path | None, typer.Option(help="Where to put it.", show_default="a folder of the job's name")] = None,
    version: Annotated[int, typer.Option(help="Which one; 0: the newest.", min=0)] = 0,
    server: Server = "",
    state: State = _DEFAULT_STATE,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Fetch what was published; interrupted, it goes on where it was."""
    screen = Screen(as_json)
    folder = to or Path(job)

    async def run() -> None:
        async with reach.connected(server, state, screen, insecure, job) as remote:
            await _pull(remote, job, artifact, folder, screen, version)

    asyncio.run(run())
    screen.say("folder", folder=str(folder))


@app.command(epilog="Example: edge-client leave clinic-notes")
def leave(
    job: Annotated[str, typer.Argument(help="The job's name.")],
    server: Server = "",
    state: State = _DEFAULT_STATE,
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Take part no more: what was sent is left out of everything that is published from now on."""
    screen = Screen(as_json)
    joined = outbox.find(state, job).joined()
    assert joined is not None, "find looks at joined jobs"

    async def run() -> None:
        async with reach.connected(server, state, screen, insecure, job) as remote:
            await remote.withdraw(joined.lease)

    asyncio.run(run())
    screen.say("left", job=job)


@app.command(epilog='Example: edge-client chat clinic-notes --prompt "Dear colleague,"')
def chat(
    model: Annotated[str, typer.Argument(help="A job's name, or a GGUF file.")],
    prompt: Annotated[str, typer.Option(help="One prompt, one answer. Left out: a conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.", min=0.0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, at a temperature over 0.", min=0)] = 0,
    server: Server = "",
    state: State = _DEFAULT_STATE,
    insecure: Insecure = False,
) -> None:
    """Talk with the published model, or with any GGUF; a model without a chat template continues your text."""
    llama.require()
    file = Path(model)
    if not file.is_file():
        folder = outbox.published_folder(state, model)
        found = sorted(folder.glob("*.gguf")) if folder.exists() else []
        file = found[0] if found else asyncio.run(_fetch_for_chat(model, server, state, insecure, folder))
    loaded = llama.load_to_talk(file, seed=seed)
    history: list[dict[str, str]] = []
    while (text := prompt or _ask()) is not None:
        if not text.strip():
            continue
        if local_model.has_chat_template(loaded):
            history.append({"role": "user", "content": text})
            pieces = local_model.reply(loaded, history, max_tokens=max_tokens, temperature=temperature)
        else:
            print(text, end="")
            pieces = local_model.complete(loaded, text, max_tokens=max_tokens, temperature=temperature)
        answer = ""
        for piece in pieces:
            answer += piece
            print(piece, end="", flush=True)
        print()
        history.append({"role": "assistant", "content": answer})
        if prompt:
            return


async def _until_published(remote: Remote, job: str, screen: Screen) -> None:
    shown = ""
    async for status in remote.watch(job):
        state = pb.State.Name(status.state).removeprefix("STATE_").lower()
        if status.state == pb.STATE_PUBLISHED:
            screen.say("published", job=job, version=status.publications[-1].version)
            return
        if status.state in (pb.STATE_EXPIRED, pb.STATE_FAILED, pb.STATE_CANCELLED):
            raise Refused(f"nothing will be published: {status.reason}")
        if state != shown:
            screen.say("waiting", state=state)
            shown = state
    raise Unreachable("the coordinator ended the conversation", hint="edge-client pull, later")


async def _pull(remote: Remote, job: str, artifact: str, folder: Path, screen: Screen, version: int = 0) -> list[Path]:
    status = await remote.job(job)
    if not status.publications:
        state = pb.State.Name(status.state).removeprefix("STATE_").lower()
        raise Refused(
            f"{job} has published nothing yet; it is {state}" + (f" ({status.reason})" if status.reason else "")
        )
    made = {publication.version: publication for publication in status.publications}
    if version and version not in made:
        there = ", ".join(str(number) for number in made)
        raise UsageError(f"{job} has no version {version}", hint=f"--version with one of: {there}")
    fetched = []
    for wanted in _select(made[version or max(made)], artifact):
        file = local_path(folder, wanted)
        if not file.is_file() or await asyncio.to_thread(stream.digest, file) != wanted.digest:
            with screen.bar(wanted.name, wanted.size) as advance:
                await remote.download(job, wanted, file, advance)
        screen.say("pulled", name=wanted.name, size=wanted.size)
        fetched.append(file)
    return fetched


def _select(publication: pb.Publication, artifact: str) -> list[pb.Artifact]:
    files = list(publication.artifacts)
    if artifact == "all":
        return files
    if artifact:
        chosen = [file for file in files if file.name == artifact or file.name.startswith(f"{artifact.rstrip('/')}/")]
        if not chosen:
            raise UsageError(
                f"the publication has no {artifact!r}", hint="one of: " + ", ".join(file.name for file in files)
            )
        return chosen
    merged = [file for file in files if file.name.endswith(".gguf") and file.name != "adapter.gguf"]
    if not merged:
        raise UsageError("the publication has no merged GGUF", hint="--artifact all")
    return [min(merged, key=lambda file: file.size)]


async def _fetch_for_chat(job: str, server: str, state: Path, insecure: bool, folder: Path) -> Path:
    screen = Screen()
    async with reach.connected(server, state, screen, insecure, job) as remote:
        return (await _pull(remote, job, "", folder, screen))[0]


def _ask() -> str | None:
    """The person's next line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotEnough(f"cannot write to {folder}: {error.strerror}") from error


def main() -> None:
    """The console script."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command.run(app, "edge-client")
    except SystemExit as end:
        if "mlx.core" in sys.modules and isinstance(end.code, int):
            # What MLX keeps for the training thread is freed while Python ends, which can abort the process, receipt or
            # not (ml-explore/mlx#4110). Nothing of ours is left to be done here.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise


if __name__ == "__main__":
    main()
