"""Using the result: which file suits a machine, whether federation helped here, and a server that others can call."""

import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from google.protobuf import json_format

from converters import adapter, peft
from coordinator.daemon import Daemon
from coordinator.jobs import spec as job
from edge_client import outbox
from edge_client.data import tokenize
from edge_client.data.tokenize import Example
from edge_client.outbox import DataSource
from edge_client.results import choose, evaluate, llama_process
from edge_client.results.choose import Fit, Memory
from edge_client.results.evaluate import Scores
from edge_client.ui import events
from oneround.errors import BadData, BadModel
from oneround.v1 import federation_pb2 as pb
from tests import commands
from tests.converters import tiny
from tests.daemons import BASE, SPEC, running
from tests.participants import contributed
from tests.waiting import LONG

GB = 2**30
PUBLISHED = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5, "q4_k_m": 4.9}  # GB, of an 8B model


def merged(*kinds: str) -> list[pb.Artifact]:
    return [pb.Artifact(name=f"notes-{kind}.gguf", size=int(PUBLISHED[kind] * GB)) for kind in kinds]


# ---- which file ----


@pytest.mark.parametrize(
    ("total", "free", "kinds", "chosen", "fit"),
    [
        (128, 100, ("f32", "f16", "q8_0"), "f32", Fit.COMFORTABLE),  # needs 40.25
        (64, 60, ("f32", "f16", "q8_0"), "f16", Fit.COMFORTABLE),  # 20.25
        (64, 60, ("q8_0", "f16", "f32"), "f16", Fit.COMFORTABLE),  # in any order
        (64, 10, ("f32", "f16", "q8_0"), "f16", Fit.FULL),  # what is free now changes what is said, not what is taken
        (64, 60, ("bf16", "f16"), "f16", Fit.COMFORTABLE),
        (64, 60, ("bf16", "q8_0"), "bf16", Fit.COMFORTABLE),
        (24, 20, ("f16", "q8_0", "q4_k_m"), "q8_0", Fit.COMFORTABLE),  # 10.875
        (16, 12, ("f16", "q8_0", "q4_k_m"), "q4_k_m", Fit.COMFORTABLE),  # 6.375
        (8, 6, ("f16", "q8_0", "q4_k_m"), "q4_k_m", Fit.TIGHT),
        (6, 5, ("f16", "q8_0", "q4_k_m"), "q4_k_m", Fit.TOO_LARGE),
        (16, 12, ("f16",), "f16", Fit.TOO_LARGE),
    ],
)
def test_the_best_fit(total: int, free: int, kinds: tuple[str, ...], chosen: str, fit: Fit) -> None:
    choice = choose.choose(merged(*kinds), Memory(total * GB, free * GB))
    assert (choice.artifact.name, choice.fit) == (f"notes-{chosen}.gguf", fit)
    alone, comfortable = len(kinds) == 1, fit in (Fit.COMFORTABLE, Fit.FULL)
    says = "the only" if alone else "the most precise" if comfortable else "the smallest"
    assert choice.reason.startswith(says)


def test_what_does_not_fit_comfortably_is_said() -> None:
    assert {fit.value for fit in Fit} - events.EVENTS.keys() == {"comfortable"}


def test_only_whole_models_are_looked_at() -> None:
    files = [pb.Artifact(name=name) for name in ("manifest.json", "adapter.gguf", "peft/x.safetensors", "n-f16.gguf")]
    assert [file.name for file in choose.merged(files)] == ["n-f16.gguf"]
    memory = choose.this_machine()
    assert 0 < memory.available <= memory.total


# ---- did it help ----


def measured(base: list[float], own: list[float], published: list[float]) -> Scores:
    """Of examples of ten tokens each; losses per token."""
    nats = {"base": base, "own": own, "published": published}
    return Scores({name: 10 * np.array(losses) for name, losses in nats.items()}, np.full(len(base), 10))


@pytest.mark.parametrize(
    ("own", "published", "helped", "says"),
    [
        ([2.0, 2.1, 2.2], [1.5, 1.6, 1.8], True, "federation helped here"),
        ([1.0, 1.1, 1.2], [1.5, 1.6, 1.8], False, "does better alone"),
        ([2.0, 2.1, 2.2], [3.5, 3.7, 3.6], False, "federation did not help here"),
        ([2.0, 1.1, 2.2], [1.5, 1.9, 1.8], None, "not clear"),
    ],
)
def test_the_sentence(own: list[float], published: list[float], helped: bool | None, says: str) -> None:
    found = measured([3.0, 3.1, 3.3], own, published)
    assert found.helped is helped and says in found.sentence
    told = found.report(7)
    assert (told.version, told.tokens) == (7, 30)
    assert told.base_loss == pytest.approx(9.4 / 3) and told.published_loss == pytest.approx(sum(published) / 3)


def test_chance_is_not_taken_for_help() -> None:
    """Two models that are equally good, each better on some examples: one in twenty comparisons may be clear."""
    rng = np.random.default_rng(0)
    clear = 0
    for _ in range(500):
        tokens = rng.integers(5, 50, 40)
        nats = {name: tokens * 3.0 + rng.normal(0, 1, 40) * np.sqrt(tokens) for name in evaluate.MODELS}
        clear += Scores(nats, tokens).difference("published", "own").sign != 0
    assert 5 <= clear <= 50
    lone = measured([3.0], [2.0], [1.0])
    assert lone.difference("published", "own").error == math.inf and lone.helped is None


def test_some_of_many_examples_are_the_same_some() -> None:
    tokens = [7, 0, 9, 8] * 50
    whole = [index for index, count in enumerate(tokens) if count]
    assert evaluate.drawn(tokens, 0) == evaluate.drawn(tokens, 1200) == whole
    some = evaluate.drawn(tokens, 100)
    assert some == evaluate.drawn(tokens, 100) == sorted(set(some)) and set(some) <= set(whole)
    assert 100 <= sum(tokens[index] for index in some) < 109


_HELD_OUT = """
import sys
from pathlib import Path
from edge_client.data import tokenize
for row in tokenize.load(Path(sys.argv[1])).held_out:
    print(row.text)
"""


def test_the_rows_that_training_holds_out(tmp_path: Path) -> None:
    """The same in every process, none that is trained on, and the same side for a row when others come."""
    data = tmp_path / "notes.jsonl"
    data.write_text("".join(json.dumps({"text": f"note {n}: the patient came {n} times"}) + "\n" for n in range(300)))
    runs = [
        subprocess.run(
            [sys.executable, "-c", _HELD_OUT, data],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    before = tokenize.load(data)
    assert runs[0] == runs[1] == "".join(f"{row.text}\n" for row in before.held_out) and len(before.held_out) > 5
    whole, again, some = (evaluate.held_out(DataSource(str(data)), BASE, 32, most) for most in (0, 0, 100))
    assert [one.ids.tolist() for one in whole] == [one.ids.tolist() for one in again]
    assert len(whole) == len(before.held_out) > len(some)
    assert not set(before.train) & set(before.held_out)
    with data.open("a") as more:
        more.write("".join(json.dumps({"text": f"later {n}"}) + "\n" for n in range(100)))
    after = tokenize.load(data)
    assert set(before.held_out) <= set(after.held_out) and set(before.train) <= set(after.train)
    with pytest.raises(BadData, match="nothing is held out"):
        (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * 2)  # one token each, and none to predict
        evaluate.held_out(DataSource(str(tmp_path / "x.jsonl")), _without_end(tmp_path / "base"), 32, 0)


def _without_end(folder: Path) -> Path:
    """A tokenizer that adds no end-of-text token."""
    tiny.save_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": None}))
    return folder


# ---- llama.cpp, apart ----


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, its GGUF beside it."""
    folder = tiny.save_model(tmp_path_factory.mktemp("small") / "small", tiny.config(tied=True))
    tiny.save_tokenizer(folder)
    evaluate.as_gguf(folder, folder.with_suffix(".gguf"), None)
    return folder


def test_losses_are_those_of_torch(small: Path, tmp_path: Path) -> None:
    import torch

    trained = tiny.save_adapter(tmp_path / "peft", small)
    adapter.write(peft.read(trained), tmp_path / "trained.safetensors", "float32")
    whole = small.with_suffix(".gguf")
    adapter.write(peft.read(trained), tmp_path / "b.safetensors", "float32", frozen_a="0" * 64)  # as where A is frozen
    alone = (tmp_path / "b.safetensors", small, whole, tmp_path / "completed.gguf", tmp_path / "trained.safetensors")
    own = evaluate.own_adapter(tmp_path / "trained.safetensors", small, whole, tmp_path / "adapter.gguf")
    assert evaluate.own_adapter(*alone).read_bytes() == own.read_bytes(), "B alone, with the A of another file"
    rng = np.random.default_rng(0)
    found = [
        Example(rng.integers(2, 300, length).astype(np.int32), np.arange(length) > rng.integers(0, length - 1))
        for length in (2, 30, 200, 7)
    ]
    done: list[int] = []
    for file, expected in ((None, tiny.torch_model(small)), (own, tiny.torch_model(small, trained))):
        losses = llama_process.losses(whole, file, found, done.append)
        for example, loss in zip(found, losses, strict=True):
            ids = torch.from_numpy(example.ids).long()
            with torch.no_grad():
                logits = expected(ids[None]).logits[0, :-1]
            each = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()
            assert loss == pytest.approx(each[example.is_target[1:]].sum(), rel=1e-4)
    assert done[-1] == done[len(found) - 1] == sum(example.num_targets for example in found)


def test_the_base_becomes_a_gguf_once(small: Path, tmp_path: Path) -> None:
    kept = evaluate.as_gguf(small, tmp_path / "base.gguf", None)
    made = kept.stat().st_mtime_ns
    assert evaluate.as_gguf(small, kept, None) == kept and kept.stat().st_mtime_ns == made
    assert evaluate.as_gguf(small, tmp_path / "other.gguf", kept) == kept


def test_what_ends_llama_cpp_ends_nothing_else(small: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(small.with_suffix(".gguf").read_bytes()[:2000])
    with (
        llama_process.Child("edge_client.results.llama_process", bad) as child,
        pytest.raises(BadData, match="not a sound GGUF"),
    ):
        llama_process.Conversation(child, bad, 0)
    file = small.with_suffix(".gguf")
    with llama_process.Child("edge_client.results.llama_process", file) as child:
        talker = llama_process.Conversation(child, file, 0)
        assert talker.has_chat_template
        child._process.send_signal(signal.SIGABRT)
        with pytest.raises(BadModel, match=r"llama\.cpp ended over small\.gguf \(SIGABRT\)"):
            list(talker.complete("The patient", max_tokens=4, temperature=0.0))


# ---- the commands ----


async def published(daemon: Daemon) -> None:
    await daemon.operator.close("notes")
    async for status in daemon.statuses.watch("notes"):
        assert status.state != pb.STATE_FAILED, status.reason
        if status.state == pb.STATE_PUBLISHED:
            return


async def test_pull_evaluate_report_and_chat(tmp_path: Path) -> None:
    """A whole life after the round: with the coordinator there, and then without it."""
    state, out = tmp_path / "client", tmp_path / "out"
    evaluating = ("evaluate", "notes", "--state", state, "--json")
    spec = {**SPEC, "publish": {"gguf": ["f16", "q8_0"]}}

    async def run(*arguments: object, code: int = 0) -> tuple[str, str]:
        return await asyncio.to_thread(commands.run, "edge-client", *arguments, code=code)

    async with running(tmp_path / "coordinator") as (daemon, address):
        await daemon.operator.submit(job.parse(spec))
        await contributed(address, tmp_path)
        _, said = await run(*evaluating, code=3)
        assert "published nothing yet" in said
        await published(daemon)

        said, _ = await run("pull", "notes", "--to", out, "--state", state, "--json")
        events = commands.events(said)
        assert events["chosen"]["name"] == events["pulled"]["name"] == "notes-f16.gguf"
        assert events["chosen"]["fit"] in ("comfortable", "full") and (out / "notes-f16.gguf").exists()

        alone, _ = await run(*evaluating)
        assert not (await daemon.operator.status("notes")).comparisons, "nothing leaves without --report"
        told, _ = await run(*evaluating, "--report")
        first, second = commands.events(alone), commands.events(told)
        assert first["evaluated"] == second["evaluated"]
        assert "base_gguf" in first and "base_gguf" not in second and "pulled" not in second
        status = await daemon.operator.status("notes")
        (evaluation,) = status.clients[0].evaluations
        sent = json_format.MessageToDict(evaluation, preserving_proto_field_name=True)
        assert {**sent, "tokens": int(sent["tokens"])} == {k: v for k, v in second["tells"].items() if k != "event"}

        _, said = await run(*evaluating, "--data", tmp_path / "nothing", code=5)
        assert "there is no file or folder" in said and "--data" in said
        _, said = await run(*evaluating, "--version", 9, code=2)
        assert "no version 9" in said

    said = first["evaluated"]
    assert said["version"] == 1 and said["examples"] > 1
    for model in evaluate.MODELS:
        assert said[model]["perplexity"] == pytest.approx(math.exp(said[model]["loss"]))
    # A cohort of one: its mean is its own adapter, but for f16's rounding.
    effect = abs(said["own"]["loss"] - said["base"]["loss"])
    assert effect > 0.01 and abs(said["own"]["loss"] - said["published"]["loss"]) < 0.1 * effect

    shown, _ = commands.run("edge-client", *evaluating[:-1], "--tokens", 50)
    assert "no coordinator answers" in shown and "Measuring v1, which is here" in shown
    assert "own adapter" in shown and "published (notes-f16)" in shown and "nats per token" in shown
    commands.run("edge-client", *evaluating, "--report", code=4)
    own = outbox.find(state, "notes")
    (own.folder / "source.json").unlink()
    commands.run("edge-client", *evaluating, code=5, cwd=tmp_path)
    spoken, _ = commands.run(
        "edge-client", "chat", "notes", "--prompt", "def f1(self):", "--max-tokens", 8, "--state", state
    )
    assert spoken.startswith("def f1(self):") and len(spoken) > 20


@dataclass(frozen=True)
class Served:
    """A server that runs, and what it said."""

    process: subprocess.Popen[str]
    url: str
    model: str

    def get(self, path: str, headers: dict[str, str] | None = None, **body: object) -> dict[str, Any]:
        data = json.dumps(body).encode() if body else None
        asked = urllib.request.Request(
            f"{self.url}{path}", data, {"Content-Type": "application/json"} | (headers or {})
        )
        with urllib.request.urlopen(asked, timeout=LONG) as answer:
            return json.loads(answer.read())  # type: ignore[no-any-return]


@pytest.fixture
def server(small: Path) -> Iterator[Served]:
    process = commands.start("edge-client", "serve", small.with_suffix(".gguf"), "--port", 0, "--json")
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        assert said["event"] == "serving" and said["has_chat_template"]
        yield Served(process, said["url"], said["model"])
    finally:
        process.kill()
        process.communicate()


def test_serving_speaks_openais_api(server: Served, small: Path) -> None:
    assert [model["id"] for model in server.get("/models")["data"]] == [server.model] == ["small"]
    asks = {"messages": [{"role": "user", "content": "The patient"}], "max_tokens": 5, "temperature": 0}
    answer = server.get("/chat/completions", model=server.model, **asks)
    assert answer["object"] == "chat.completion" and answer["usage"]["completion_tokens"] <= 5
    talked, _ = commands.run(
        "edge-client", "chat", small.with_suffix(".gguf"), "--prompt", "The patient", "--max-tokens", 5
    )
    assert answer["choices"][0]["message"]["content"] == talked.removesuffix("\n"), "the same words as in chat"

    with pytest.raises(urllib.error.HTTPError, match="400"):  # a name that was made to mean this machine
        server.get("/models", headers={"Host": "evil.example"})
    asked = urllib.request.Request(f"{server.url}/models", headers={"Origin": "http://evil.example"})
    with urllib.request.urlopen(asked, timeout=LONG) as answered:
        assert "access-control-allow-origin" not in answered.headers, "no web page reads what the model says"

    port = server.url.rpartition(":")[2].partition("/")[0]
    _, said = commands.run("edge-client", "serve", small.with_suffix(".gguf"), "--port", port, code=2)
    assert "cannot listen" in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_server_ends_when_it_is_told(server: Served, number: int) -> None:
    (child,) = psutil.Process(server.process.pid).children()
    server.process.send_signal(number)
    assert commands.finish(server.process) == ("", "")
    assert not child.is_running()
