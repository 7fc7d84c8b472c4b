"""What is in an adapter, and what is wrong with it; of a file that is refused, as much as can be told."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters import experts, formats, lenient_reader, settings
from converters.adapter import Adapter, LowRank
from converters.architectures import Base, check_fits
from converters.formats import AdapterFile
from converters.gguf import adapter as gguf_adapter
from converters.gguf import file as gguf_file
from oneround.errors import BadAdapter, BadData

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_SHOWN = {  # settings that say how an adapter was made, by format
    "peft": ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "bias",
             "init_lora_weights", "base_model_name_or_path", "peft_version"),
    "mlx": ("fine_tune_type", "lora_parameters", "num_layers", "model"),
    "gguf": ("general.type", "general.architecture", "general.name", "adapter.type", "adapter.lora.alpha"),
}  # fmt: skip
# A norm stands out when its logarithm is so many standard deviations (by the MAD) from the median of its kind of
# module, and it is at least so many times as large or as small.
_STANDS_OUT, _TIMES = 6.0, 3.0


OnProgress = Callable[[int, int], None]  # done, of how many


class Module(NamedTuple):
    """One adapted module."""

    name: str
    block: int | None
    kind: str  # its name within the block
    rank: int
    scaling: float | None  # that was folded into B; None where it cannot be told, and the norm is without it
    dtype: str  # of the stored factors
    norm: float  # ‖ΔW‖, Frobenius


@dataclass
class Inspection:
    """What was found. `problems` make an adapter useless or unreadable, `remarks` are worth a look."""

    format: str
    path: str
    size: int  # bytes
    settings: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    modules: list[Module] = field(default_factory=list)
    tensors: list[str] = field(default_factory=list)  # of a file that is refused, what is no pair: name, type, shape
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """As JSON has it, which knows no NaN: it is null there."""
        fields = {**vars(self), "modules": [module._asdict() for module in self.modules]}
        plain: dict[str, Any] = json.loads(json.dumps(fields), parse_constant=lambda name: None)
        return plain


def inspect(adapter_file: AdapterFile, base: Base | None, on_module: OnProgress) -> Inspection:
    """Look at an adapter; `on_module` hears how many modules of how many are done. Never raises for what it finds."""
    inspection = Inspection(adapter_file.format, str(adapter_file.path), size(adapter_file.path))
    inspection.settings = settings_of(adapter_file)
    try:
        update = _read(adapter_file, base)
        if base is not None:
            check_fits(base, {name: shape for name, shape in update.shapes.items() if not experts.is_expert(name)})
        inspection.metadata, updates = dict(update.metadata), update.modules
    except BadData as error:
        inspection.problems.append(f"{error}" + (f" ({error.hint})" if error.hint else ""))
        updates, inspection.tensors = lenient_reader.pairs(adapter_file)
    for n, (name, factors) in enumerate(updates.items(), 1):
        inspection.modules.append(_module(name, factors, scaled=not inspection.problems))
        factors.forget()
        on_module(n, len(updates))
    inspection.problems += [
        f"{module.name} holds NaN or Inf" for module in inspection.modules if not np.isfinite(module.norm)
    ]
    inspection.remarks += _remarks(inspection.modules)
    return inspection


def norm(update: LowRank) -> float:
    """‖ΔW‖ (Frobenius) without forming ΔW: ‖BA‖² is the trace of (BᵀB)(AAᵀ), both of rank × rank."""
    with np.errstate(all="ignore"):  # what is not finite is told, not warned of
        a, b = update.a.astype(np.float64), update.b.astype(np.float64)
        squared = float(np.einsum("ij,ji->", b.T @ b, a @ a.T))
    return float(np.sqrt(max(squared, 0.0))) if np.isfinite(squared) else float("nan")


def _read(adapter_file: AdapterFile, base: Base | None) -> Adapter:
    """By the names that the file has, where there is no base to translate them."""
    if adapter_file.format == "gguf" and base is None:
        return gguf_adapter.read_as_named(adapter_file.path)[1]
    return formats.read(adapter_file, base)


def _module(name: str, update: LowRank, *, scaled: bool) -> Module:
    name = name.removesuffix(".weight")
    number = _NUMBER.search(name)
    kind = _NUMBER.sub(".*", name[number.end() + 1 :]) if number else name
    (term,) = update.terms
    return Module(
        name=name,
        block=int(number[1]) if number else None,
        kind=kind,
        rank=update.rank,
        scaling=term.weight if scaled else None,
        dtype=term.a.dtype.name,
        norm=norm(update),
    )


def _remarks(modules: Iterable[Module]) -> Iterable[str]:
    modules = [module for module in modules if np.isfinite(module.norm)]
    zero = [module.name for module in modules if module.norm == 0]
    if zero and len(zero) == len(modules):
        yield "ΔW is zero everywhere: the adapter was not trained"
    elif zero:
        yield f"ΔW is zero in {len(zero)} of {len(modules)} modules, {zero[0]} for one"
    for kind, count in Counter(module.kind for module in modules if module.norm > 0).items():
        if count < 5:
            continue
        of_kind = [module for module in modules if module.kind == kind and module.norm > 0]
        logs = np.log([module.norm for module in of_kind])
        middle = np.median(logs)
        spread = max(1.4826 * float(np.median(np.abs(logs - middle))), 0.05)
        for module, distance in zip(of_kind, (logs - middle) / spread, strict=True):
            if abs(distance) > max(_STANDS_OUT, np.log(_TIMES) / spread):
                yield f"{module.name} stands out: ‖ΔW‖ is {module.norm:.3g}, others of its kind {np.exp(middle):.3g}"


def settings_of(adapter_file: AdapterFile) -> dict[str, Any]:
    """What a file says of how the adapter was made: adapter_config.json, or a GGUF's keys."""
    try:
        if adapter_file.format == "gguf":
            source = gguf_file.read(adapter_file.path)
            return {key: value for key in _SHOWN["gguf"] if (value := source.value(key)) is not None}
        if adapter_file.format in _SHOWN:
            values = settings.read(adapter_file.path / "adapter_config.json", BadAdapter).values
            return {key: values[key] for key in _SHOWN[adapter_file.format] if values.get(key) not in (None, {}, [])}
    except BadData:
        pass  # reading the adapter says why
    return {}


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for what is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
