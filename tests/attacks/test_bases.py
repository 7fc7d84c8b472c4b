"""Base models that would have the libraries run a program, fetch one, or read elsewhere. The program leaves a file
behind; that the file is not there proves that it did not run."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from converters import adapter, architectures, custom_code, peft
from converters.gguf import base as gguf_base
from coordinator.jobs import base_model as bases
from coordinator.jobs import spec as job
from coordinator.publication import modelfile
from edge_client import backends
from edge_client.data import tokenize
from edge_client.data.batches import Batches
from edge_client.results import llama_process
from edge_client.training.recipe import Recipe
from oneround.errors import BadAdapter, BadData, BadModel
from tests import commands, hostile
from tests.hostile import BASE, base_with

usable = [name for name in backends.BACKENDS if backends.load(name).available() is None]
assert usable
needs_mlx = pytest.mark.skipif("mlx" not in usable, reason="needs mlx")
needs_torch = pytest.mark.skipif("torch" not in usable, reason="needs torch")

OWN = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def armed(folder: Path, mark: Path) -> Path:
    """The folder with a program in it that leaves the mark."""
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\n")
    return folder


def train(backend: str, folder: Path) -> None:
    """One step of a job over the base in a folder."""
    spec = job.parse(hostile.SPEC)
    shapes = architectures.adapted(architectures.describe(BASE), spec.lora.target_modules)
    plan = Batches(tokenize.windows(range(2, 40), 8), 2, 0.1, 0)
    backends.load(backend).train(
        folder, adapter.initial(shapes, 2, 0), Recipe.from_spec(spec, plan.total_steps), plan, lambda _: None
    )


def run(program: str, folder: Path) -> None:
    """A library as somebody would use it who trusts the folder."""
    cache = folder.parent / "cache"
    environment = {**os.environ, "HF_HOME": str(cache), "HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, check=False)


@needs_torch
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_of_the_models_own_is_not_run(tmp_path: Path, mark: Path, name: str) -> None:
    folder = armed(base_with(tmp_path / "base", model_type="evil", architectures=["Evil"]), mark)
    base_with(folder, "tokenizer_config.json", tokenizer_class="Evil")
    base_with(folder, name, auto_map=OWN)
    with pytest.raises(BadModel, match="no model that transformers can load") as raised:
        train("torch", folder)
    assert f"{name} names code of the model's own" in raised.value.hint and "True" not in str(raised.value)
    try:
        tokenize.load_tokenizer(folder)
    except BadModel as refused:
        assert f"{name} names code of the model's own" in refused.hint
    assert not mark.exists()

    kind = "AutoConfig" if name == "config.json" else "AutoTokenizer"
    loads = f"from transformers import {kind} as A; import sys; A.from_pretrained(sys.argv[1], trust_remote_code=True)"
    run(loads, folder)
    assert mark.exists(), "the program is a real one: whoever trusts the folder runs it"


@needs_torch
def test_a_known_model_that_has_code_too_is_loaded_without_it(tmp_path: Path, mark: Path) -> None:
    """As Phi-3 on the hub."""
    folder = armed(base_with(tmp_path / "base", auto_map=OWN), mark)
    base_with(folder, "tokenizer_config.json", auto_map=OWN)
    train("torch", folder)
    assert tokenize.load_tokenizer(folder)("a b")["input_ids"]
    assert not mark.exists()


@needs_mlx
def test_mlx_runs_no_file_that_the_settings_name(tmp_path: Path, mark: Path) -> None:
    folder = armed(base_with(tmp_path / "base", model_file="evil.py"), mark)
    with pytest.raises(BadModel, match=r"config\.json has model_file: mlx-lm would run that file"):
        train("mlx", folder)
    assert not mark.exists()
    run(
        "import sys, pathlib, mlx_lm.utils as u; u.load_model(pathlib.Path(sys.argv[1]), trust_remote_code=True)",
        folder,
    )
    assert mark.exists(), "the program is a real one"


@pytest.mark.parametrize(
    ("file", "keys", "says"),
    [
        ("config.json", {"model_file": "evil.py"}, "has model_file"),
        ("config.json", {"text_config": {"model_file": "evil.py"}}, "has model_file"),
        ("config.json", {"transformers_weights": "adapter_model.bin"}, "has transformers_weights"),
        ("config.json", {"quantization_config": {"quant_method": "awq"}}, "has quantization_config"),
        ("config.json", {"attn_implementation": "evil/kernel"}, "asks by attn_implementation for 'evil/kernel'"),
        ("config.json", {"_attn_implementation": {"": "sdpa", "vision": "evil/kernel@main:f"}}, "evil/kernel@main"),
        ("config.json", {"text_config": [{"_attn_implementation": "flash_attention_2"}]}, "flash_attention_2"),
        ("generation_config.json", {"custom_generate": "evil/repo"}, "has custom_generate"),
        ("tokenizer_config.json", {"vocab_file": "/etc/passwd"}, "names files by vocab_file"),
        ("tokenizer_config.json", {"tokenizer_file": "../../secret.json"}, "names files by tokenizer_file"),
        ("tokenizer_config.json", {"init_inputs": ["/etc/passwd"]}, "names files by init_inputs"),
        ("tokenizer_config.json", {"fast_tokenizer_files": ["../x/tokenizer.4.0.0.json"]}, "fast_tokenizer_files"),
    ],
)
def test_settings_that_ask_for_more_than_settings_may(
    tmp_path: Path, file: str, keys: dict[str, Any], says: str
) -> None:
    folder = base_with(tmp_path / "base", file, **keys)
    with pytest.raises(BadModel, match=says.replace(".", r"\.")):
        tokenize.load_tokenizer(folder)
    for backend in usable:
        with pytest.raises(BadModel, match=says.replace(".", r"\.")):
            train(backend, folder)
    with pytest.raises(BadModel, match=says.replace(".", r"\.")):
        bases.prepare(job.parse({**hostile.SPEC, "model": {"base": str(folder)}}).model, tmp_path / "cache")


def test_notes_of_whoever_saved_it_are_no_reason(tmp_path: Path) -> None:
    folder = base_with(tmp_path / "base", _attn_implementation="sdpa", _name_or_path="/home/x")
    base_with(
        folder, "tokenizer_config.json", special_tokens_map_file="/root/x.json", tokenizer_file="", init_inputs=[]
    )
    custom_code.check(folder)


@pytest.mark.parametrize("backend", usable)
def test_weights_are_safetensors_beside_their_index_and_nothing_else(tmp_path: Path, mark: Path, backend: str) -> None:
    folder = base_with(tmp_path / "base")
    (folder / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for name in ("pytorch_model.bin", "model.pt", "adapter_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(BadModel, match="no weights in safetensors form"):
        train(backend, folder)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadModel, match="not the name of a safetensors file beside it"):
        train(backend, folder)
    assert not mark.exists()
    pickle.loads((folder / "model.pt").read_bytes())
    assert mark.exists(), "the pickle is a real one"


def test_an_adapter_that_is_a_pickle(tmp_path: Path, mark: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(mark)))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    own = {"auto_mapping": {"base_model_class": "Evil", "parent_library": "evil"}, "runtime_config": {"x": "evil"}}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**settings, **own}))
    with pytest.raises(BadAdapter, match="a pickle, which can run code and is not read"):
        peft.read(tmp_path / "adapter")
    assert not mark.exists()


def test_llama_cpps_script_does_not_see_a_model_with_code(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For some families convert_hf_to_gguf.py itself trusts remote code."""
    script = tmp_path / "bin" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(
        f"#!{sys.executable}\nfrom pathlib import Path\nPath({str(mark)!r}).touch()\nraise SystemExit('x')\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    folder = base_with(tmp_path / "base", architectures=["EvilForCausalLM"], auto_map=OWN)
    with pytest.raises(BadModel, match="names code of the model's own"):
        gguf_base.build(folder, tmp_path / "x.gguf")
    assert not mark.exists()
    with pytest.raises(BadModel, match="does not convert"):
        gguf_base.build(base_with(folder, auto_map=None), tmp_path / "x.gguf")
    assert mark.exists(), "without such code it is asked"


def templates(mark: Path) -> list[str]:
    """Chat templates that reach for Python."""
    command = f"touch {mark}"
    return [
        f"{{{{ cycler.__init__.__globals__.os.system('{command}') }}}}",
        f"{{{{ self.__init__.__globals__.__builtins__.__import__('os').system('{command}') }}}}",
        f"{{{{ ''.__class__.__mro__[1].__subclasses__()[0].__init__.__globals__['os'].system('{command}') }}}}",
        f"{{{{ (messages|attr('__class__')).__base__.__subclasses__() }}}}{{{{ messages.append('{command}') }}}}",
        f"{{% set f = '{{0.__class__.__init__.__globals__[os]}}'.format %}}{{{{ f(cycler) }}}}{command}",
        f"{{% include '{mark.parent}/secret.txt' %}}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
    ]


@pytest.mark.parametrize("number", range(7))
def test_chat_templates_reach_nothing(tmp_path: Path, mark: Path, number: int) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (template,) = templates(mark)[number : number + 1]
    folder = base_with(tmp_path / "base", "tokenizer_config.json", chat_template=template)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "q", "completion": "d"}\n')
    rows = tokenize.load(tmp_path / "rows.jsonl").train
    with pytest.raises(BadData, match="the model's chat template refuses this conversation"):
        tokenize.tokenise(rows, tokenize.load_tokenizer(folder), 64)
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile.text("x.gguf", template=template), "none is made of it"
    assert not mark.exists()


def test_llama_cpp_renders_templates_that_reach_nothing(tmp_path: Path, mark: Path) -> None:
    folder = base_with(tmp_path / "base", "tokenizer_config.json", chat_template=templates(mark)[0])
    gguf_base.build(folder, tmp_path / "x.gguf")
    with llama_process.Child("edge_client.results.llama_process", tmp_path / "x.gguf") as child:
        talker = llama_process.Conversation(child, tmp_path / "x.gguf", 0)
        assert talker.has_chat_template
        with pytest.raises(BadData):
            list(talker.reply([{"role": "user", "content": "hello"}], max_tokens=4, temperature=0.0))
    assert not mark.exists()


@contextmanager
def hub() -> Iterator[tuple[str, list[str]]]:
    """Somebody in the place of the Hugging Face hub, and what was asked of them."""
    asked: list[str] = []

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@needs_torch
async def test_a_client_fetches_from_its_coordinator_and_from_nobody_else(
    tmp_path: Path, mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole command, over a base whose settings name code on the hub."""
    elsewhere = {"AutoConfig": "evil/repo--evil.Evil", "AutoModelForCausalLM": "evil/repo--evil.Evil"}
    folder = armed(base_with(tmp_path / "base", model_type="evil", _name_or_path="evil/repo", auto_map=elsewhere), mark)
    base_with(folder, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil/repo--evil.Evil", None]})
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    job_, files = hostile.announced(tmp_path, folder, names)
    data = tmp_path / "rows.txt"
    data.write_text("for line in file:\n    print(line)\n" * 50)
    state, server = tmp_path / "client", hostile.Hostile(job_, files)

    with hub() as (endpoint, asked):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        async with hostile.serving(server) as address:
            where = ("--server", address, "--insecure", "--data", data, "--state", state)
            _, err = await asyncio.to_thread(
                commands.run, "edge-client", "join", *where, "--backend", "torch", "--yes", code=5
            )
        assert "auto_map" in err and asked == [] and not mark.exists()
        await asyncio.to_thread(urllib.request.urlopen, f"{endpoint}/evil/repo")
        assert asked == ["/evil/repo"], "it would have been seen"
    assert server.joined
