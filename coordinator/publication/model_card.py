"""What a person finds in a publication's folder: a model card that says what this is and how to run it, and a Modelfile
for Ollama."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from converters.gguf import file as gguf_file
from coordinator import aggregate
from coordinator.jobs import spec as jobs
from coordinator.publication import modelfile
from coordinator.publication.parts import Part
from oneround import files, statements
from oneround.manifest import Manifest, StartedFrom
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

_LOCAL = "BASE"  # for a base that has no name but a path on the coordinator's machine


def write(folder: Path, spec: pb.JobSpec, manifest: Manifest, parts: Sequence[Part]) -> None:
    """Write README.md, and Modelfile for the smallest merged file, from what the manifest says of these parts."""
    smallest = min(manifest.verification, key=lambda name: (folder / name).stat().st_size)
    gguf = gguf_file.read(folder / smallest)
    template = gguf.value("tokenizer.chat_template")
    text = modelfile.text(
        smallest,
        template=template if isinstance(template, str) else "",
        bos=gguf.token("tokenizer.ggml.bos_token_id"),
        eos=gguf.token("tokenizer.ggml.eos_token_id"),
    )
    files.replace(folder / "Modelfile", [text.encode()])
    files.replace(folder / "README.md", [_card(spec, manifest, parts, smallest).encode()])


def _card(spec: pb.JobSpec, manifest: Manifest, parts: Sequence[Part], smallest: str) -> str:
    local = jobs.is_path(spec.model.base)
    base = Path(spec.model.base).name if local else spec.model.base  # the hub takes names only
    front = ModelCardData(
        base_model=base,
        base_model_relation="adapter",
        library_name="peft",
        model_name=spec.name,
        pipeline_tag="text-generation",
        tags=["lora", "gguf", "mlx", "llama-cpp", "federated-learning", "oneround"],
    )
    examples = [entry.num_examples for entry in manifest.contributions if entry.weight > 0]
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {spec.name}, version {manifest.version}",
        f"A LoRA adapter for `{base}`, averaged by oneround in one round over"
        f" {len(examples)} {'client' if len(examples) == 1 else 'clients'} with {sum(examples):,} training"
        " examples in all. Each client trained on its own machine and sent its adapter once; nobody's data left it.",
        _files(parts),
        _verification(manifest),
        _commands(spec.name, _LOCAL if local else base, smallest),
        _training(spec, manifest),
    ]
    return "\n\n".join(sections) + "\n"


def _files(parts: Sequence[Part]) -> str:
    """The merged models first, with their sizes."""
    rows = [
        *(
            (part.name, f"{part.about}, {human_size(part.path.stat().st_size)}")
            if part.kind
            else (f"{part.name}/" if part.path.is_dir() else part.name, part.about)
            for part in sorted(parts, key=lambda part: not part.kind)
        ),
        ("Modelfile", "for Ollama"),
        (statements.MANIFEST, "what went in, how it was checked, and the SHA-256 of every file"),
        (statements.SIGNATURE, "the coordinator's signature over it"),
    ]
    return _table("Files", ("file", "what it is"), [(f"`{name}`", about) for name, about in rows])


def _verification(manifest: Manifest) -> str:
    rows = [
        (
            f"`{name}`",
            check.against,
            f"{check.measure.replace('_', ' ')} {check.value:.2g} (bound {check.bound:.3g})",
            f"{check.top1_agreement:.1%}",
            f"{check.perplexity:.3f} ({check.perplexity_against:.3f})",
        )
        for name, check in manifest.verification.items()
    ]
    heads = ("file", "held against", "difference", "top-1 agreement", "perplexity (theirs)")
    table = _table("Checked by llama.cpp before release", heads, rows)
    effect = (
        "Float files are held to the relative logit difference: the largest over positions of ‖difference‖ / ‖logits‖."
        f" By that measure the adapter itself moves the base by {manifest.adapter_effect:.2g}."
    )
    notes = "\n".join(_notes(manifest))
    return "\n\n".join([table, effect, *([notes] if notes else [])])


def _notes(manifest: Manifest) -> Iterator[str]:
    """What a person should know of files that are not as one would expect, a line each."""
    for name, reason in manifest.withheld.items():
        yield f"- `{name}` is not released: {reason}"
    for name, entry in manifest.quantised.items():
        if entry.fallbacks:
            kinds = ", ".join(f"{kind} for {count}" for kind, count in Counter(entry.fallbacks.values()).items())
            yield (
                f"- `{name}`: {len(entry.fallbacks)} tensors have rows that do not divide into its blocks, and another"
                f" type: {kinds} (`{statements.MANIFEST}` lists them)"
            )
    if manifest.base_rounding:
        yield (f"- The base GGUF was quantised: its weights were off by {manifest.base_rounding:.1%} before merging.")


def _commands(name: str, base: str, smallest: str) -> str:
    pipeline = f"""pipeline("text-generation", "peft", tokenizer="{base}")("Hello")"""
    lines = [
        ("llama.cpp", f"llama-server -m {smallest}"),
        ("llama.cpp, the adapter alone over a GGUF of the base", "llama-server -m BASE.gguf --lora adapter.gguf"),
        ("Ollama", f"ollama create {name} -f Modelfile && ollama run {name}"),
        ("LM Studio", f"lms import {smallest}"),
        ("mlx-lm", f'mlx_lm.generate --model {base} --adapter-path mlx --prompt "Hello"'),
        ("transformers", f"python -c 'from transformers import pipeline; print({pipeline})'"),
    ]
    where = "\n\n`BASE` is the folder of the base model on your machine." if base == _LOCAL else ""
    shown = "\n".join(f"# {program}\n{line}" for program, line in lines)
    return f"## Run it, from this folder\n\n```sh\n{shown}\n```{where}"


def _training(spec: pb.JobSpec, manifest: Manifest) -> str:
    train, lora = spec.train, spec.lora
    frozen = " A frozen," if lora.freeze_a else ""
    kept = f", which keeps {manifest.energy_kept:.1%} of ‖ΔW‖²" if manifest.energy_kept < 1 else ""
    return (
        f"## How it was made\n\n{_start(manifest.started_from)}"
        f"LoRA of rank {lora.rank}, alpha {lora.alpha:g},{frozen} on {', '.join(lora.target_modules)};"
        f" {train.epochs:g} epochs of AdamW at learning rate {train.learning_rate:g} ({train.schedule}), batches of"
        f" {train.batch_size} with at most {train.max_seq_len} tokens, seed {train.seed}. Averaged with"
        f" `{aggregate.described(spec.aggregate)}`; the published adapter has rank {manifest.rank}{kept}. The base's"
        " licence holds for what is made from it."
    )


def _start(started_from: StartedFrom) -> str:
    """What its clients began with, so that a chain of rounds can be followed back."""
    if not started_from:
        return ""
    if not started_from.job:
        return f"It started from an adapter that was there before (SHA-256 `{started_from.digest}`). "
    return (
        f"It started from version {started_from.version} of `{started_from.job}` (SHA-256 of its manifest.json:"
        f" `{started_from.digest}`), and holds what that one learnt. "
    )


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
