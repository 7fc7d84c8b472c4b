"""What is different between two publications: who took part, how they were averaged, and what came of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from converters import peft
from coordinator.aggregate import METHODS
from coordinator.aggregate.gram import inner
from oneround import manifest, statements
from oneround.errors import LayoutMismatch
from oneround.manifest import ContributionEntry, FileCheck, Manifest
from oneround.text import human_size

_MOST_CHANGED = 5
_ROUNDING = 1e-7  # relative; what the difference of two equal updates may come to in float64
_OF_CLIENTS = ("num_examples", "weight", "verdict", "digest")
_OF_FILES = ("perplexity", "value")


def compare(old: Path, new: Path) -> dict[str, Any]:
    """Two publications' folders, compared; ready for JSON. What has a before and an after is a list of the two.

    - `publication`: job and version; `folder`.
    - `mean`: `method`, `server_learning_rate` and the parameters of each one's method (null where the other has none),
      `rank` of the adapter, `energy_kept`; `settings`: every other setting of the job that differs, by its key in the
      job file.
    - `clients`: how many take part; `changed`: those that were added or removed, and those whose contribution
      (`digest`), `verdict`, `weight` or `num_examples` changed, with both; null where the client is not. A client is
      known by its id, or by its name in manifests without ids.
    - `adapter`: `relative_change` ‖ΔW₂ − ΔW₁‖ / ‖ΔW₁‖, `cosine` and `norm` over all modules, exact, and `modules`: the
      same for those that changed most, relatively. A ratio over zero is null.
    - `files`: those that differ, by name: `size` in bytes, and where llama.cpp judged them `perplexity` and `value`,
      the distance from what they are held against (`measure`). Null where the file is not.

    Raises:
        BadData: a folder is no publication, or its manifest or adapter is not sound.
        LayoutMismatch: the two adapt different modules, so that there is nothing to compare.
    """
    manifests = [manifest.open_file(folder / statements.MANIFEST) for folder in (old, new)]
    jobs = [_flat(side.job) for side in manifests]
    parameters = [_parameters(job) for job in jobs]
    keys = sorted(jobs[0].keys() | jobs[1].keys())
    return {
        "publication": [f"{side.job_name} v{side.version}" for side in manifests],
        "folder": [str(old), str(new)],
        "mean": {
            **{key: [job.get(f"aggregate.{key}") for job in jobs] for key in ("method", "server_learning_rate")},
            **{
                key.rpartition(".")[-1]: [side.get(key) for side in parameters] for key in parameters[0] | parameters[1]
            },
            **{key: [getattr(side, key) for side in manifests] for key in ("rank", "energy_kept")},
        },
        "settings": {
            key: [job.get(key) for job in jobs]
            for key in keys
            if not key.startswith("aggregate.") and jobs[0].get(key) != jobs[1].get(key)
        },
        "clients": _clients(manifests),
        "adapter": _adapters(old, new),
        "files": _files(manifests),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _parameters(job: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a job's aggregation method, by their keys in the job file; another's say nothing of it."""
    method = METHODS.get(str(job.get("aggregate.method")))
    names = (f"aggregate.{name}" for name in method.parameters) if method else ()
    return {name: job.get(name) for name in names}


def _clients(manifests: Sequence[Manifest]) -> dict[str, Any]:
    lists = [{entry.id or entry.client: entry for entry in side.contributions} for side in manifests]
    changed = []
    for key in sorted(lists[0].keys() | lists[1].keys()):
        before, after = (entries.get(key) for entries in lists)
        values = {name: [_told(before, name), _told(after, name)] for name in _OF_CLIENTS}
        latest = after or before
        if latest is not None and any(not _equal(*both) for both in values.values()):
            changed.append({"client": latest.client, "id": latest.id, "reason": latest.reason, **values})
    counts = [sum(1 for entry in entries.values() if entry.weight > 0) for entries in lists]
    return {"take_part": counts, "changed": changed}


def _told(entry: ContributionEntry | FileCheck | None, name: str) -> Any:
    """What a manifest says under a name; None where it says nothing, as the first ones did of verdicts."""
    value = getattr(entry, name, None)
    return None if value == "" else value


def _equal(before: Any, after: Any) -> bool:
    floats = isinstance(before, float) and isinstance(after, float)
    return math.isclose(before, after) if floats else bool(before == after)


def _adapters(old: Path, new: Path) -> dict[str, Any]:
    before, after = peft.read(old / "peft"), peft.read(new / "peft")
    if before.shapes != after.shapes:
        odd = sorted(name for name, _ in before.shapes.items() ^ after.shapes.items())
        raise LayoutMismatch(f"{old} and {new} do not adapt the same modules, {odd[0]} for one")
    modules, total = [], [0.0, 0.0, 0.0]
    for name in sorted(before.modules):
        left, right = before.modules[name].pieces(), after.modules[name].pieces()
        products = [float(inner(left).sum()), float(inner(right).sum()), float(inner(left, right).sum())]
        total = [sum(pair) for pair in zip(total, products, strict=True)]
        modules.append({"module": name, **_distance(*products)})
    modules.sort(key=lambda module: -math.inf if module["relative_change"] is None else -module["relative_change"])
    return {**_distance(*total), "modules": modules[:_MOST_CHANGED]}


def _distance(before: float, after: float, product: float) -> dict[str, Any]:
    """From ‖ΔW₁‖², ‖ΔW₂‖² and ⟨ΔW₁, ΔW₂⟩."""
    norms = [math.sqrt(max(before, 0.0)), math.sqrt(max(after, 0.0))]
    change = math.sqrt(max(before + after - 2 * product, 0.0))
    change = change if change > _ROUNDING * max(norms) else 0.0
    both = norms[0] * norms[1]
    return {
        "relative_change": change / norms[0] if norms[0] else None if change else 0.0,
        "cosine": min(max(product / both, -1.0), 1.0) if both else None,
        "norm": norms,
    }


def _files(manifests: Sequence[Manifest]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    for name in sorted({name for side in manifests for name in side.files}):
        before, after = (side.files.get(name) for side in manifests)
        if before == after:
            continue
        changed[name] = {"size": [entry.size if entry else None for entry in (before, after)]}
        checks = [side.verification.get(name) for side in manifests]
        if any(checks):
            changed[name] |= {key: [_told(check, key) for check in checks] for key in ("measure", *_OF_FILES)}
    return changed


def table(difference: Mapping[str, Any]) -> RenderableType:
    """The result of `compare`, for people."""
    mean, adapter = difference["mean"], difference["adapter"]
    lines = [
        _both(difference["publication"]),
        f"  mean      {_both(mean['method'])}, rank {_both(mean['rank'])}{_settings(mean)}",
        f"  clients   {_both(difference['clients']['take_part'])}",
        f"  adapter   {_moved(adapter)}",
        *(f"  {key} {_both(values)}" for key, values in difference["settings"].items()),
    ]
    parts: list[RenderableType] = [Text("\n".join(lines))]
    if clients := difference["clients"]["changed"]:
        parts.append(_rows(("client", "id", "verdict", "weight", "examples", "why"), map(_client, clients)))
    if adapter["relative_change"] != 0:
        rows = [(module["module"], _moved(module), _both(module["norm"], _short)) for module in adapter["modules"]]
        parts.append(_rows(("modules that changed most", "change", "‖ΔW‖"), rows))
    if files := difference["files"]:
        parts.append(_rows(("file", "size", "perplexity", "distance"), (_file(*item) for item in files.items())))
    return Group(*parts)


def _settings(mean: Mapping[str, Any]) -> str:
    """A method's parameters, and what truncation kept where something was lost."""
    values = {key: value for key, value in mean.items() if key not in ("method", "rank", "energy_kept")}
    shown = "".join(f", {key.replace('_', ' ')} {_both(both, _short)}" for key, both in values.items())
    kept = [share for share in mean["energy_kept"] if share is not None]
    return shown + (f", energy kept {_both(mean['energy_kept'], '{:.1%}'.format)}" if min(kept, default=1) < 1 else "")


def _client(client: Mapping[str, Any]) -> tuple[str, ...]:
    before, after = client["digest"]
    why = ["sent another"] if before and after and before != after else []
    why += [client["reason"]] if client["reason"] else []
    numbers = _both(client["weight"], lambda value: f"{value:.1%}"), _both(client["num_examples"])
    return client["client"], client["id"], _both(client["verdict"]), *numbers, "; ".join(why)


def _file(name: str, file: Mapping[str, Any]) -> tuple[str, ...]:
    figures = [_both(file[key], _short) if key in file else "" for key in _OF_FILES]
    return name, _both(file["size"], human_size), *figures


def _moved(distance: Mapping[str, Any]) -> str:
    """How far an adapter, or a module of it, is from what it was."""
    if (change := distance["relative_change"]) is None:
        return "nothing before"
    cosine = "" if distance["cosine"] is None else f", cosine {distance['cosine']:.4f}"
    return f"changed by {change:.2%}{cosine}" if change else "the same"


def _both(values: Sequence[Any], show: Callable[[Any], str] = str) -> str:
    """`before -> after`, or one where they look alike; a dash for what is not there."""
    before, after = ("–" if value is None else show(value) for value in values)
    return before if before == after else f"{before} -> {after}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    rendered = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        rendered.add_column(head)
    for row in rows:
        rendered.add_row(*map(escape, row))
    return rendered
