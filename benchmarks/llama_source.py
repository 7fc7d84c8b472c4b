"""llama.cpp's own convert_hf_to_gguf.py, which is in llama-cpp-python's source archive and not in its wheel.

The archive of the installed version is fetched with pip once, and kept among the user's caches;
ONEROUND_LLAMA_CPP_SOURCE may name an archive, or the folder that it unpacks to.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs

DRIVER = """
import json, sys
sys.path.insert(0, sys.argv[1])
import convert_hf_to_gguf
from conversion.base import TextModel
for pre, folder, out, kind in json.load(sys.stdin):
    if pre:  # the script knows pre-tokenizers by a hash over tokens, which no small tokenizer has
        TextModel.get_vocab_base_pre = lambda self, tokenizer, pre=pre: pre
    sys.argv = ["convert_hf_to_gguf.py", folder, "--outfile", out, "--outtype", kind]
    convert_hf_to_gguf.main()
"""

# pip wants to know an archive's metadata; this build backend makes them up, and nothing is built.
_BACKEND = """
from pathlib import Path

def prepare_metadata_for_build_wheel(folder, settings=None):
    made = Path(folder) / "llama_cpp_python-{version}.dist-info"
    made.mkdir()
    (made / "METADATA").write_text("Metadata-Version: 2.1\\nName: llama-cpp-python\\nVersion: {version}\\n")
    return made.name
"""


class Absent(Exception):
    """The script cannot be had, with the reason."""


def folder() -> Path:
    """The folder with convert_hf_to_gguf.py.

    Raises:
        Absent: pip does not fetch the archive, or what was given has no such script.
    """
    version = importlib.metadata.version("llama-cpp-python")
    cache = platformdirs.user_cache_path("oneround") / f"llama-cpp-python-{version}"
    given = os.environ.get("ONEROUND_LLAMA_CPP_SOURCE")
    source = Path(given) if given and Path(given).is_dir() else _unpacked(Path(given) if given else None, cache)
    script = next(source.rglob("convert_hf_to_gguf.py"), None)
    if script is None:
        raise Absent(f"there is no convert_hf_to_gguf.py in {source}")
    return script.parent


def convert(script: Path, wanted: list[tuple[str, Path, Path, str]]) -> None:
    """Run the script of `folder()` over (pre-tokenizer or "", model, file, type), in one process of its own.

    Raises:
        RuntimeError: it failed, with what it said last.
    """
    jobs = json.dumps([[pre, str(model), str(out), kind] for pre, model, out, kind in wanted])
    # The gguf package beside the script is the one that it was written for.
    environment = {**os.environ, "PYTHONPATH": str(script / "gguf-py")}
    command = [sys.executable, "-c", DRIVER, str(script)]
    done = subprocess.run(command, input=jobs, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-1500:])


def _unpacked(archive: Path | None, cache: Path) -> Path:
    unpacked = cache / "scripts"
    if unpacked.is_dir():
        return unpacked
    cache.mkdir(parents=True, exist_ok=True)
    wanted = ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py")  # of vendor/llama.cpp
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        with tarfile.open(archive or _fetched(Path(scratch))) as packed:
            inside = [
                member for member in packed if member.name.split("/")[3:4] and member.name.split("/")[3] in wanted
            ]
            packed.extractall(Path(scratch) / "scripts", members=inside, filter="data")
        (Path(scratch) / "scripts").replace(unpacked)
    return unpacked


def _fetched(to: Path) -> Path:
    version = importlib.metadata.version("llama-cpp-python")
    backend = to / "backend" / "scikit_build_core"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build.py").write_text(_BACKEND.format(version=version))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--dest", str(to)]
    done = subprocess.run(
        [*command, "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(backend.parent)},
        check=False,
    )
    if not (found := sorted(to.glob("*.tar.gz"))):
        raise Absent(f"pip does not fetch llama-cpp-python's source: {done.stderr.strip()[-300:]}")
    return found[0]
