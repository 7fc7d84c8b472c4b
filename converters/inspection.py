"""What is in an adapter, and what is wrong with it; of a file that is refused, as much as can be told."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters import formats, gguf_adapter, gguf_file, settings, tensors
from converters.adapter import Adapter, LowRank
from converters.architectures import Base, check_fits
from converters.errors import BadAdapter, BadData
from converters.formats import Found

_NUMBER = re.compile(r"\.(\d+)(?=\.)")
_SHOWN = {  # settings that say how an adapter was made, by format
    "peft": ("r", "lora_alpha", "use_rslora", "target_modules", "rank_pattern", "alpha_pattern", "use_dora", "bias",
             "init_lora_weights", "base_model_name_or_path", "peft_version"),
    "mlx": ("fine_tune_type", "lora_parameters", "num_layers", "model"),
}  # fmt: skip
_STANDS_OUT = 6.0  # standard deviations of log ‖ΔW‖ within a kind of module, by the median and the MAD


OnProgress = Callable[[int, int], None]  # done, of how many


class Module(NamedTuple):
    """One adapted module."""

    name: str
    block: int | None
    kind: str  # its name within the block
    rank: int
    scaling: float | None  # that was folded into B; None where it cannot be told, and the norm is without it
    dtype: str  # of the stored factors
    norm: float | None  # ‖ΔW‖, Frobenius


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
        """As JSON has it, which knows no NaN: a norm that is none is null."""
        listed = [module._replace(norm=module.norm if isfinite(module.norm) else None) for module in self.modules]
        known = {**vars(self), "modules": [module._asdict() for module in listed]}
        return json.loads(json.dumps(known), parse_constant=str)  # type: ignore[no-any-return]


def inspect(found: Found, base: Base | None, on_module: OnProgress) -> Inspection:
    """Look at an adapter; `on_module` hears how many modules of how many are done. Never raises for what it finds."""
    said = Inspection(found.format, str(found.path), size(found.path))
    said.settings = settings_of(found)
    try:
        update = _read(found, base)
        if base is not None:
            check_fits(base, update.shapes)
    except BadData as error:
        said.problems.append(f"{error}" + (f" ({error.hint})" if error.hint else ""))
        said.tensors = list(_raw(found.path))
        return said
    said.metadata = dict(update.metadata)
    for n, (name, factors) in enumerate(update.modules.items(), 1):
        said.modules.append(_module(name, factors))
        factors.forget()
        on_module(n, len(update.modules))
    said.problems += [f"{module.name} holds NaN or Inf" for module in said.modules if not np.isfinite(module.norm)]
    said.remarks += _remarks(said.modules)
    return said


def norm(update: LowRank) -> float:
    """‖ΔW‖ (Frobenius) without forming ΔW: ‖BA‖² is the trace of (BᵀB)(AAᵀ), both of rank × rank."""
    a, b = update.a.astype(np.float64), update.b.astype(np.float64)
    with np.errstate(all="ignore"):
        squared = float(np.einsum("ij,ji->", b.T @ b, a @ a.T))
    return float(np.sqrt(max(squared, 0.0))) if np.isfinite(squared) else float("nan")


def _read(found: Found, base: Base | None) -> Adapter:
    """By the names that the file has, where there is no base to translate them."""
    if found.format == "gguf" and base is None:
        return gguf_adapter.read_as_named(found.path)[1]
    return formats.read(found, base)


def _module(name: str, update: LowRank) -> Module:
    name = name.removesuffix(".weight")
    number = _NUMBER.search(name)
    kind = _NUMBER.sub(".*", name[number.end() + 1 :]) if number else name
    (term,) = update.terms
    return Module(
        name, int(number[1]) if number else None, kind, update.rank, term.weight, term.a.dtype.name, norm(update)
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
            if abs(distance) > _STANDS_OUT:
                yield f"{module.name} stands out: ‖ΔW‖ is {module.norm:.3g}, others of its kind {np.exp(middle):.3g}"


def settings_of(found: Found) -> dict[str, Any]:
    """What adapter_config.json says of how the adapter was made."""
    if found.format not in _SHOWN:
        return {}
    try:
        values: Mapping[str, Any] = settings.read(found.path / "adapter_config.json", BadAdapter).values
    except BadData:
        return {}  # reading the adapter says why
    return {key: values[key] for key in _SHOWN[found.format] if values.get(key) not in (None, {}, [])}


def _raw(path: Path) -> Iterable[str]:
    """Tensors as they stand, of whatever files can be opened."""
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        try:
            if file.suffix == ".safetensors":
                for name, tensor in tensors.read(file)[0].items():
                    yield f"{name}  {tensor.dtype.name} {tensor.shape}"
            elif file.suffix == ".gguf":
                for name, stored in gguf_file.read(file).tensors.items():
                    yield f"{name}  {stored.info.type.name} {stored.info.shape}"
        except BadData:
            continue  # that is what is wrong with it


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for what is not there."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
