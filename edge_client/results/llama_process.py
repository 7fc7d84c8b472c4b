"""llama.cpp in a process of its own. It ends the process over some files and texts, and a published model is not ours.

The child (`python -m edge_client.results.llama_process`) reads requests and writes replies, a line of JSON
each. It is in a session of its own, so that an interrupt is for us alone, and ends when its input does, however this
process ends.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from converters import llama
from edge_client.data.tokenize import Example
from edge_client.results import llama_model
from oneround.errors import BadModel, OneroundError, from_status

if TYPE_CHECKING:
    from llama_cpp import Llama

Reply = dict[str, Any]


class Child:
    """A Python module at work in a process of its own on a model file.

    Raises, from every method:
        BadModel: the process has ended; or any OneroundError that the module raised.
    """

    def __init__(self, module: str, file: Path) -> None:
        self._file = file
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  it lives as long as the child
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            text=True,
            start_new_session=True,
        )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._complaints):
            assert stream is not None
            with suppress(BrokenPipeError):  # what it did not read is still to be written
                stream.close()

    def ask(self, **request: Any) -> Iterator[Reply]:
        """The replies to a request, as they come."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{json.dumps(request)}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        for line in self._process.stdout:
            reply: Reply = json.loads(line)
            if "end" in reply:
                return
            if "error" in reply:
                raise from_status(reply["status"], reply["error"], reply["hint"])
            yield reply
        raise self._ended()

    def wait(self) -> None:
        """Wait until the process ends, which is never as it should be."""
        self._process.wait()
        raise self._ended()

    def _ended(self) -> BadModel:
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit {code}"
        self._complaints.seek(0)
        complaints = self._complaints.read().decode(errors="replace").strip().splitlines()
        return BadModel(
            f"llama.cpp ended over {self._file.name} ({how})" + (f": {complaints[-1][:300]}" if complaints else ""),
            hint="if it fails on other text too, the file is damaged: pull it again, or pull another version",
        )


def losses(
    model: Path, adapter: Path | None, examples: Sequence[Example], on_tokens: Callable[[int], None]
) -> list[float]:
    """Negative log-likelihood of each example's targets in nats, by a GGUF and perhaps a GGUF adapter over it.

    `on_tokens` is called with the number of target tokens that are done.

    Raises:
        BadModel: llama.cpp does not take the files, or ends over them.
    """
    nats: list[float] = []
    tokens_done = 0
    with Child("edge_client.results.llama_process", model) as child:
        longest = max(len(example.ids) for example in examples)
        adapter_path = str(adapter) if adapter else None
        list(child.ask(do="measure", model=str(model), adapter=adapter_path, context=longest))
        for example in examples:
            replies = child.ask(do="nats", ids=example.ids.tolist(), targets=np.flatnonzero(example.is_target).tolist())
            nats += [reply["nats"] for reply in replies]
            tokens_done += example.num_targets
            on_tokens(tokens_done)
    return nats


class Conversation:
    """A conversation with a model, which is loaded in a child."""

    def __init__(self, child: Child, model: Path, seed: int) -> None:
        self._child = child
        (opened,) = child.ask(do="talk", model=str(model), seed=seed)
        self.has_chat_template: bool = opened["has_chat_template"]

    def complete(self, prompt: str, *, max_tokens: int, temperature: float) -> Iterator[str]:
        """The continuation of a text, in pieces."""
        replies = self._child.ask(do="complete", prompt=prompt, max_tokens=max_tokens, temperature=temperature)
        return (reply["piece"] for reply in replies)

    def reply(self, messages: list[dict[str, str]], *, max_tokens: int, temperature: float) -> Iterator[str]:
        """The next turn of a conversation, in pieces."""
        replies = self._child.ask(do="reply", messages=messages, max_tokens=max_tokens, temperature=temperature)
        return (reply["piece"] for reply in replies)


# ---- in the child ----


def answer(requests: Iterator[Reply], tell: Callable[[Reply], None]) -> None:
    """Do what is asked, one request after the other, with the model that the last `measure` or `talk` loaded."""
    model: Llama | None = None
    for request in requests:
        do = request.pop("do")
        try:
            if do == "measure":
                adapter = Path(request["adapter"]) if request["adapter"] else None
                model = llama.load(Path(request["model"]), adapter=adapter, context=max(request["context"], 8))
            elif do == "talk":
                model = llama.load_to_talk(Path(request["model"]), seed=request["seed"])
                tell({"has_chat_template": llama_model.has_chat_template(model)})
            elif do == "nats":
                assert model is not None
                is_target = np.zeros(len(request["ids"]), np.bool_)
                is_target[request["targets"]] = True
                tell({"nats": llama_model.nats(model, Example(np.array(request["ids"], np.int32), is_target))})
            else:
                assert model is not None
                says = llama_model.reply(model, **request) if do == "reply" else llama_model.complete(model, **request)
                for piece in says:
                    tell({"piece": piece})
            tell({"end": True})
        except OneroundError as error:
            tell(failure(error))


def failure(error: OneroundError) -> Reply:
    """An error, as a reply."""
    return {"error": str(error), "hint": error.hint, "status": error.status}


def teller() -> Callable[[Reply], None]:
    """Writes replies to what is standard output now; from here on that is for complaints, whoever prints there."""
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def tell(reply: Reply) -> None:
        print(json.dumps(reply), file=out, flush=True)

    return tell


if __name__ == "__main__":
    answer(map(json.loads, sys.stdin), teller())
