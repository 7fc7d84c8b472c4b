"""The straight line with nothing but the command line: three speakers, mixed backends, and a model that is right."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from converters import adapter, llama
from edge_client import outbox
from tests import commands

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
STORIES = SHARED / "models" / "stories260K"
SHAKESPEARE = SHARED / "data" / "tinyshakespeare" / "input.txt"
CLIENTS = {"MENENIUS": "torch", "CORIOLANUS": "mlx", "VOLUMNIA": "torch"}

JOB = """
name = "plays"
[model]
base = "{base}"
[lora]
rank = 8
alpha = 16
[train]
epochs = 1
learning_rate = 5e-3
max_seq_len = 128
[round]
min_clients = 3
target_clients = 3
[upload]
dtype = "float32"
[publish]
gguf = ["f32", "q8_0"]
"""


@dataclass(frozen=True)
class Played:
    """A folder in which the whole job has run over a base."""

    base: Path
    folder: Path


def speeches(base: Path, name: str) -> list[str]:
    """What a client has: all that a speaker of Shakespeare's says, or short functions where that is not at hand."""
    if base != STORIES:
        return [f"def {name.lower()}_{n}(self):\n    return self.{name.lower()}[{n}]\n" for n in range(40)]
    found = re.findall(rf"^{name}:\n(.+?)(?:\n\n|\Z)", SHAKESPEARE.read_text(), flags=re.M | re.S)
    assert len(found) > 20
    return found[:80]


@pytest.fixture(scope="module", params=[ROOT / "benchmarks" / "base", STORIES], ids=["own base", "stories260K"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    base: Path = request.param
    if base == STORIES and not (STORIES.exists() and SHAKESPEARE.exists()):
        pytest.skip("needs ../shared/models/stories260K and ../shared/data/tinyshakespeare")
    folder = tmp_path_factory.mktemp("plays")
    (folder / "plays.toml").write_text(JOB.format(base=base))
    for name in CLIENTS:
        rows = (json.dumps({"text": speech}) + "\n" for speech in speeches(base, name))
        (folder / f"{name}.jsonl").write_text("".join(rows))
    with commands.coordinator(folder / "coordinator") as address:
        commands.run("coordinator", "submit", folder / "plays.toml", "--state", folder / "coordinator")
        common = ("join", "--yes", "--server", address, "--json", "--wait")
        clients = {
            name: commands.start(
                "edge-client",
                *common,
                *("--data", folder / f"{name}.jsonl", "--backend", backend, "--name", name),
                *("--state", folder / name),
            )
            for name, backend in CLIENTS.items()
        }
        for name, client in clients.items():
            out, _ = commands.finish(client)
            (folder / f"{name}.events").write_text(out)
        pull = ("pull", "plays", "--artifact", "all", "--to", folder / "published", "--state", folder / "MENENIUS")
        commands.run("edge-client", *pull)
        damaged = folder / "published" / "adapter.gguf"
        whole = damaged.read_bytes()
        damaged.write_bytes(bytes(len(whole)))
        commands.run("edge-client", *pull)
        assert damaged.read_bytes() == whole, "a file of the right size and other content is fetched again"
        shown, _ = commands.run("coordinator", "show", "plays", "--state", folder / "coordinator", "--json")
        (folder / "shown.json").write_text(shown)
    return Played(base, folder)


def test_the_published_model_is_base_plus_mean(played: Played) -> None:
    """llama.cpp on the published GGUF against torch on the base plus the mean of the three ΔW."""
    import torch
    from transformers import AutoModelForCausalLM

    sent = [outbox.find(played.folder / name, "plays") for name in CLIENTS]
    weights = np.array([box.trained().num_examples for box in sent], np.float64)  # type: ignore[union-attr]
    weights /= weights.sum()
    adapters = [adapter.read(box.adapter) for box in sent]

    model = AutoModelForCausalLM.from_pretrained(played.base, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, 96).tolist()
    with torch.no_grad():
        before = model(torch.tensor([ids])).logits[0].numpy()
        for name in adapters[0].modules:
            mean = sum(w * a.modules[name].delta() for w, a in zip(weights, adapters, strict=True))
            model.get_submodule(name).weight += torch.from_numpy(np.asarray(mean, np.float32))
        expected = model(torch.tensor([ids])).logits[0].numpy()
    found = llama.logits(llama.load(played.folder / "published" / "plays-f32.gguf"), ids)
    assert np.abs(expected - before).max() > 1.0, "training changed the model"
    assert np.abs(found - expected).max() < 1e-3


def test_every_form_of_the_publication_is_there(played: Played) -> None:
    published = played.folder / "published"
    manifest = json.loads((published / "manifest.json").read_text())
    assert {"plays-f32.gguf", "plays-q8_0.gguf", "adapter.gguf"} <= manifest["files"].keys()
    assert (published / "peft" / "adapter_model.safetensors").exists()
    assert (published / "mlx" / "adapters.safetensors").exists()
    assert sorted(given["client"] for given in manifest["contributions"]) == sorted(CLIENTS)
    for verdict in manifest["verification"].values():
        assert verdict["passed"] and verdict["value"] <= verdict["bound"]


def test_each_client_sent_one_adapter_and_says_so(played: Played) -> None:
    shown = json.loads((played.folder / "shown.json").read_text())
    assert shown["state"] == "STATE_PUBLISHED"
    sent = {client["name"]: client["contribution"]["declaration"] for client in shown["clients"]}
    for name in CLIENTS:
        said = commands.events((played.folder / f"{name}.events").read_text())
        assert said["receipt"]["digest"] == sent[name]["digest"]
        assert said["receipt"]["size"] == int(sent[name]["size"])
        assert said["published"]["version"] == 1
    out, _ = commands.run("edge-client", "status", "--state", played.folder / "MENENIUS", "--json")
    assert [(row["job"], row["stage"]) for row in json.loads(out)] == [("plays", "contributed")]


def test_the_published_model_speaks(played: Played) -> None:
    file = played.folder / "published" / "plays-q8_0.gguf"
    said, _ = commands.run("edge-client", "chat", file, "--prompt", "Once upon a time", "--max-tokens", 20)
    assert said.startswith("Once upon a time") and len(said) > 30
