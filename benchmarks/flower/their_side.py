"""Flower's side of against_flower.py: its deployment on loopback with TLS. One SuperLink, a SuperNode per client."""

from __future__ import annotations

import datetime
import ipaddress
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from converters import adapter, architectures

from .both_sides import Found, Step, Task, end

APP = Path(__file__).with_name("app")


@contextmanager
def superlink(task: Task, out: Path, rounds: int, variables: dict[str, str]) -> Iterator[Flower]:
    """A SuperLink with defaults, but that apps bring no packages of their own."""
    out.mkdir(parents=True)
    certificate, key = _certificate(out)
    side = Flower(task, out, rounds, certificate, variables)
    options = ["--ssl-ca-certfile", certificate, "--ssl-certfile", certificate, "--ssl-keyfile", key]
    host, _, port = side.address.rpartition(":")
    try:
        side.pid = side.start(
            "superlink",
            *("flower-superlink", "--host", host, "--port", port, *options),
            "--disable-runtime-dependency-installation",
        )
        side.await_server()
        yield side
    finally:
        for process in side.processes.values():
            end(process.pid)


class Flower:
    """A SuperLink, its SuperNodes, and the run that is made on them."""

    pid = 0

    def __init__(self, task: Task, out: Path, rounds: int, certificate: Path, variables: dict[str, str]) -> None:
        self._task, self._out, self._rounds, self._certificate = task, out, rounds, certificate
        self._variables = variables | {"FLWR_HOME": str(out / "flwr"), "OMP_NUM_THREADS": str(task.threads)}
        self.address = f"127.0.0.1:{_free_port()}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: list[IO[bytes]] = []
        self._initial, self._trained = out / "initial.safetensors", out / "result.safetensors"
        linears = architectures.describe(task.base).linears
        adapter.write(adapter.initial(linears, task.rank, task.seed), self._initial)  # as the coordinator's

    def start(self, name: str, *command: object) -> int:
        with (self._out / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [*map(str, command)], stdout=log, stderr=log, env=self._variables, cwd=self._out
            )
        return self.processes[name].pid

    def await_server(self) -> None:
        host, _, port = self.address.rpartition(":")
        for _ in range(600):
            with closing(socket.socket()) as attempt:
                if attempt.connect_ex((host, int(port))) == 0:
                    return
            if self.processes["superlink"].poll() is not None:
                break
            time.sleep(0.1)
        sys.exit(f"the SuperLink did not start; see {self._out / 'superlink.log'}")

    def join(self, client: str, address: str) -> int:
        of_node = f"data='{self._task.data / client}' log='{self._out / client}.steps'"
        return self.start(
            client,
            *("flower-supernode", "--superlink", address, "--root-certificates", self._certificate),
            *("--port", _free_port(), "--node-config", of_node),
        )

    def begin(self) -> None:
        home = self._out / "flwr"
        home.mkdir(exist_ok=True)
        (home / "config.toml").write_text(
            '[superlink]\ndefault = "here"\n'
            f'[superlink.here]\naddress = "{self.address}"\nroot-certificates = "{self._certificate}"\n'
        )
        task = self._task
        config = {
            "base": str(task.base),
            "initial": str(self._initial),
            "result": str(self._trained),
            "clients": len(task.clients),
            "quorum": task.quorum,
            "rounds": self._rounds,
            "timeout": float(task.timeout),
            "alpha": float(task.alpha),
            "epochs": float(task.epochs),
            "learning-rate": task.learning_rate,
            "batch-size": task.batch_size,
            "sequence": task.sequence,
            "seed": task.seed,
        }
        said = " ".join(f"{key}={json.dumps(value)}" for key, value in config.items())
        self.start("run", "flwr", "run", APP, "here", "--run-config", said)

    def steps(self, client: str) -> Sequence[Step]:
        file = self._out / f"{client}.steps"
        whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
        return [Step(**json.loads(line)) for line in whole]

    def finished(self) -> float | None:
        if self.processes["run"].poll():
            sys.exit(f"`flwr run` failed; see {self._out / 'run.log'}")
        if b"raised an exception" in (self._out / "superlink.log").read_bytes():
            sys.exit(f"the ServerApp failed; see {self._out / 'superlink.log'}")
        return self._trained.stat().st_mtime if self._trained.with_suffix(".json").exists() else None

    def result(self) -> Found:
        rounds = json.loads(self._trained.with_suffix(".json").read_text())
        return {
            "adapter": adapter.read(self._trained),
            "results": [found["results"] for found in rounds],
            "failures": [found["failures"] for found in rounds],
        }


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1, signed by itself, and its key: both PEM files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "superlink")])
    now = datetime.datetime.now(datetime.UTC)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=7))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    files = folder / "certificate.pem", folder / "key.pem"
    files[0].write_bytes(made.public_bytes(Encoding.PEM))
    files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files
