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

from converters import peft, settings
from converters.settings import Settings
from coordinator.aggregate import METHODS
from coordinator.aggregate.gram import inner
from oneround.errors import BadModel, LayoutMismatch
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
    sides = [settings.read(folder / "manifest.json", BadModel) for folder in (old, new)]
    jobs = [_flat(side.table("job").values) for side in sides]
    used = [_parameters(job) for job in jobs]
    keys = sorted(jobs[0].keys() | jobs[1].keys())
    return {
        "publication": [f"{job.get('name')} v{side.get('version')}" for job, side in zip(jobs, sides, strict=True)],
        "folder": [str(old), str(new)],
        "mean": {
            **{key: [job.get(f"aggregate.{key}") for job in jobs] for key in ("method", "server_learning_rate")},
            **{key.rpartition(".")[-1]: [side.get(key) for side in used] for key in used[0] | used[1]},
            **{key: [side.get(key) for side in sides] for key in ("rank", "energy_kept")},
        },
        "settings": {
            key: [job.get(key) for job in jobs]
            for key in keys
            if not key.startswith("aggregate.") and jobs[0].get(key) != jobs[1].get(key)
        },
        "clients": _clients(sides),
        "adapter": _adapters(old, new),
        "files": _files(sides),
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined with dots."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _parameters(job: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a job's aggregation method, by their keys in the job file; another's say nothing of it."""
    method = METHODS.get(str(job.get("aggregate.method")))
    names = (f"aggregate.{name}" for name in method.parameters) if method else ()
    return {name: job.get(name) for name in names}


def _clients(sides: Sequence[Settings]) -> dict[str, Any]:
    lists = [_contributions(side) for side in sides]
    changed = []
    for key in sorted(lists[0].keys() | lists[1].keys()):
        entries = [known.get(key, Settings({}, key, BadModel)) for known in lists]
        found = {name: [entry.get(name) for entry in entries] for name in _OF_CLIENTS}
        if any(not _equal(*values) for values in found.values()):
            latest = entries[1] if entries[1].values else entries[0]
            told = {
                "client": latest.text("client", ""),
                "id": latest.text("id", ""),
                "reason": latest.text("reason", ""),
            }
            changed.append({**told, **found})
    counts = [sum(1 for entry in known.values() if entry.number("weight", 0.0, positive=False) > 0) for known in lists]
    return {"take_part": counts, "changed": changed}


def _contributions(manifest: Settings) -> dict[str, Settings]:
    found = {}
    for entry in manifest.items("contributions"):
        if not isinstance(entry, dict):
            raise manifest.bad("one of its contributions is not an object")
        found[str(entry.get("id") or entry.get("client"))] = Settings(entry, manifest.source, BadModel)
    return found


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
        one, other = before.modules[name].pieces(), after.modules[name].pieces()
        found = [float(inner(one).sum()), float(inner(other).sum()), float(inner(one, other).sum())]
        total = [sum(pair) for pair in zip(total, found, strict=True)]
        modules.append({"module": name, **_distance(*found)})
    modules.sort(key=lambda found: -math.inf if found["relative_change"] is None else -found["relative_change"])
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


def _files(sides: Sequence[Settings]) -> dict[str, Any]:
    listed, checked = [side.table("files") for side in sides], [side.table("verification") for side in sides]
    found: dict[str, Any] = {}
    for name in sorted({name for files in listed for name in files.values}):
        here = [files.table(name) for files in listed]
        if here[0].get("sha256") == here[1].get("sha256"):
            continue
        sizes = [one.integer("size", low=0, high=2**63) if one.values else None for one in here]
        found[name] = {"size": sizes}
        verdicts = [verdicts.table(name) for verdicts in checked]
        if any(verdict.values for verdict in verdicts):
            numbers = {key: [verdict.get(key) for verdict in verdicts] for key in _OF_FILES}
            found[name] |= {"measure": [verdict.get("measure") for verdict in verdicts], **numbers}
    return found


def table(difference: Mapping[str, Any]) -> RenderableType:
    """What `compare` found, for people."""
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
        rows = [(one["module"], _moved(one), _both(one["norm"], _short)) for one in adapter["modules"]]
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


def _client(one: Mapping[str, Any]) -> tuple[str, ...]:
    sent = "sent another; " if None not in one["digest"] and one["digest"][0] != one["digest"][1] else ""
    numbers = _both(one["weight"], lambda value: f"{value:.1%}"), _both(one["num_examples"])
    return one["client"], one["id"], _both(one["verdict"]), *numbers, (sent + one["reason"]).removesuffix("; ")


def _file(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    judged = [_both(one[key], _short) if key in one else "" for key in _OF_FILES]
    return name, _both(one["size"], human_size), *judged


def _moved(found: Mapping[str, Any]) -> str:
    if (change := found["relative_change"]) is None:
        return "nothing before"
    cosine = "" if found["cosine"] is None else f", cosine {found['cosine']:.4f}"
    return f"changed by {change:.2%}{cosine}" if change else "the same"


def _both(values: Sequence[Any], show: Callable[[Any], str] = str) -> str:
    """`before -> after`, or one where they look alike; a dash for what is not there."""
    before, after = ("–" if value is None else show(value) for value in values)
    return before if before == after else f"{before} -> {after}"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _rows(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    found = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        found.add_column(head)
    for row in rows:
        found.add_row(*map(escape, row))
    return found
