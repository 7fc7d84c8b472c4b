"""What a person finds in a publication's folder: a model card that says what this is and how to run it, and a Modelfile
for Ollama."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from converters.gguf import file as gguf_file
from coordinator import aggregate
from coordinator.jobs import spec as jobs
from coordinator.publication import modelfile
from coordinator.publication.verify import Verification
from oneround import files
from oneround.text import human_size
from oneround.v1 import federation_pb2 as pb

_LOCAL = "BASE"  # for a base that has no name but a path on the coordinator's machine


@dataclass(frozen=True)
class CardFacts:
    """What the card tells."""

    spec: pb.JobSpec
    version: int
    n_clients: int
    n_examples: int
    rank: int  # the largest of the modules'
    energy_kept: float  # share of ‖ΔW‖² that is left after truncation to it
    checked: Verification
    fallbacks: Mapping[str, Mapping[str, str]]  # quantised file -> tensor -> the type that it has instead
    started_from: Mapping[str, Any]  # the earlier job, its version, and a digest; empty for a fresh adapter
    base_rounding: float  # what a quantised base GGUF had lost, relatively; 0.0 for floats


def write(folder: Path, facts: CardFacts) -> None:
    """Write README.md, and Modelfile for the smallest merged file."""
    smallest = min(facts.checked.verdicts, key=lambda name: (folder / name).stat().st_size)
    known = gguf_file.read(folder / smallest)
    template = known.value("tokenizer.chat_template")
    text = modelfile.text(
        smallest,
        template=template if isinstance(template, str) else "",
        bos=known.token("tokenizer.ggml.bos_token_id"),
        eos=known.token("tokenizer.ggml.eos_token_id"),
    )
    files.replace(folder / "Modelfile", [text.encode()])
    files.replace(folder / "README.md", [_card(folder, facts, smallest).encode()])


def _card(folder: Path, facts: CardFacts, smallest: str) -> str:
    spec = facts.spec
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
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {spec.name}, version {facts.version}",
        f"A LoRA adapter for `{base}`, averaged by oneround in one round over"
        f" {facts.n_clients} {'client' if facts.n_clients == 1 else 'clients'} with {facts.n_examples:,} training"
        " examples in all. Each client trained on its own machine and sent its adapter once; nobody's data left it.",
        _files(folder, facts),
        _verification(facts),
        _commands(facts, _LOCAL if local else base, smallest),
        _training(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _files(folder: Path, facts: CardFacts) -> str:
    merged = facts.checked.verdicts
    rows = [
        *((name, f"base + adapter in one file, {human_size((folder / name).stat().st_size)}") for name in merged),
        ("adapter.gguf", "the adapter for llama.cpp, to be loaded beside a GGUF of the base"),
        ("peft/", "the adapter for PEFT and transformers"),
        ("mlx/", "the adapter for mlx-lm"),
        ("Modelfile", "for Ollama"),
        ("manifest.json", "what went in, how it was checked, and the SHA-256 of every file"),
        ("manifest.json.signature", "the coordinator's signature over it"),
    ]  # fmt: skip
    return _table("Files", ("file", "what it is"), [(f"`{name}`", what) for name, what in rows])


def _verification(facts: CardFacts) -> str:
    rows = [
        (
            f"`{name}`",
            verdict.against,
            f"{verdict.measure.replace('_', ' ')} {verdict.value:.2g} (bound {verdict.bound:.3g})",
            f"{verdict.top1_agreement:.1%}",
            f"{verdict.perplexity:.3f} ({verdict.perplexity_against:.3f})",
        )
        for name, verdict in facts.checked.verdicts.items()
    ]
    heads = ("file", "held against", "difference", "top-1 agreement", "perplexity (theirs)")
    table = _table("Checked by llama.cpp before release", heads, rows)
    aside = [f"- `{name}` is not released: {reason}" for name, reason in facts.checked.withheld.items()]
    effect = (
        "Float files are held to the relative logit difference: the largest over positions of ‖difference‖ / ‖logits‖."
        f" By that measure the adapter itself moves the base by {facts.checked.adapter_effect:.2g}."
    )
    notes = [
        *aside,
        *(
            f"- `{name}`: {len(tensors)} tensors have rows that do not divide into its blocks, and another type: "
            + ", ".join(f"{kind} for {count}" for kind, count in Counter(tensors.values()).items())
            + " (`manifest.json` lists them)"
            for name, tensors in facts.fallbacks.items()
            if tensors
        ),
    ]
    if facts.base_rounding:
        notes.append(
            f"- The base GGUF was quantised: its weights were off by {facts.base_rounding:.1%} before merging."
        )
    return "\n\n".join([table, effect, *(["\n".join(notes)] if notes else [])])


def _commands(facts: CardFacts, base: str, smallest: str) -> str:
    name = facts.spec.name
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
    shown = "\n".join(f"# {what}\n{line}" for what, line in lines)
    return f"## Run it, from this folder\n\n```sh\n{shown}\n```{where}"


def _training(facts: CardFacts) -> str:
    train, lora = facts.spec.train, facts.spec.lora
    frozen = " A frozen," if lora.freeze_a else ""
    kept = f", which keeps {facts.energy_kept:.1%} of ‖ΔW‖²" if facts.energy_kept < 1 else ""
    return (
        f"## How it was made\n\n{_start(facts.started_from)}"
        f"LoRA of rank {lora.rank}, alpha {lora.alpha:g},{frozen} on {', '.join(lora.target_modules)};"
        f" {train.epochs:g} epochs of AdamW at learning rate {train.learning_rate:g} ({train.schedule}), batches of"
        f" {train.batch_size} with at most {train.max_seq_len} tokens, seed {train.seed}. Averaged with"
        f" `{aggregate.described(facts.spec.aggregate)}`; the published adapter has rank {facts.rank}{kept}. The base's"
        " licence holds for what is made from it."
    )


def _start(taken: Mapping[str, Any]) -> str:
    """What its clients began with, so that a chain of rounds can be followed back."""
    if not taken:
        return ""
    if not taken.get("job"):
        return f"It started from an adapter that was there before (SHA-256 `{taken['digest']}`). "
    return (
        f"It started from version {taken['version']} of `{taken['job']}` (SHA-256 of its manifest.json:"
        f" `{taken['digest']}`), and holds what that one learnt. "
    )


def _table(title: str, heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
