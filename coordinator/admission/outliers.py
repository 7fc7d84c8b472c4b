"""How contributions compare with each other, before they are averaged.

No ΔW is formed. Each core holds a few clients' tensors of one module; all else is (clients × modules) floats for norms
and (clients × jurors) for cosines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from converters.updates.update import Floats, ModuleUpdate, Update
from coordinator.aggregate.gram import Indices, in_parallel, inner
from coordinator.aggregate.gram import norms as norms_of
from oneround.v1 import federation_pb2 as pb

Verdict = Literal["admitted", "clipped", "quarantined"]

COHORT = 4  # fewer have no median to speak of, and no majority
_FAR = 10.0  # an outlier is at least so many medians large, however close together the others lie
_FLOOR = 0.05  # two honest clients' norms differ by some per cent from the order of batches alone; also, no 0 / 0
_NORMS_AGREE, _SAME = 1e-3, 0.9999  # of a duplicate's modules, relatively; its cosine
_JURORS = 128  # members that everybody is held against pair by pair


@dataclass(frozen=True)
class Member:
    """One contribution. `adapter`: its whole ΔW, or in a job that starts from an adapter what it changed of that.
    `by_hand`: the operator has admitted it, and nothing that is found takes it out or clips it."""

    id: str
    name: str
    adapter: Update[ModuleUpdate]
    num_examples: int
    by_hand: bool = False


@dataclass(frozen=True)
class Assessment:
    """What is made of one contribution."""

    verdict: Verdict
    reason: str  # empty for a plain admission
    norm: float  # ‖ΔW‖ over all modules, as it came
    cosine: float | None  # to the mean of all others that agree, -1 to 1; None where there is nothing to compare
    scale: Mapping[str, float] = field(default_factory=dict)  # module -> factor < 1, of clipped modules only


@dataclass(frozen=True)
class Observation:
    """What one check makes of a cohort.

    `reasons`: who is set aside, by place in the cohort, and why. `empty`: whoever that is does not count as a member.
    `scale` (clients, modules): how much of each module is left. `cosines` (clients,): to the mean of the others, NaN
    where there is none. None: as before.
    """

    reasons: Mapping[int, str] = field(default_factory=dict)
    empty: bool = False
    scale: Floats | None = None
    cosines: Floats | None = None


@dataclass(frozen=True)
class Comparison:
    """A cohort as far as it has been compared: K clients, in order of arrival.

    `norms`: ‖ΔW‖ as it came (K, modules). `reasons` (K,): why each is set aside; empty where it is not. `size`:
    members, whether set aside or not, but for those that sent nothing new.
    """

    members: Sequence[Member]
    modules: Sequence[str]
    norms: Floats
    scale: Floats
    cosines: Floats
    reasons: Sequence[str]
    size: int

    @staticmethod
    def of(members: Sequence[Member]) -> Comparison:
        """Before any check."""
        norms = norms_of([member.adapter for member in members])
        count, nothing = len(members), np.full(len(members), np.nan)
        modules = sorted(members[0].adapter.modules)
        return Comparison(members, modules, norms, np.ones_like(norms), nothing, [""] * count, count)

    @property
    def live(self) -> Indices:
        """Who is not set aside."""
        return np.flatnonzero([not reason for reason in self.reasons])

    @property
    def is_cohort(self) -> bool:
        """Whether there are enough to have a median to speak of, and a majority."""
        return self.size >= COHORT

    def after(self, observation: Observation) -> Comparison:
        """With what one more check has seen. The first reason stands."""
        reasons = [reason or observation.reasons.get(i, "") for i, reason in enumerate(self.reasons)]
        return replace(
            self,
            reasons=reasons,
            size=self.size - (len(observation.reasons) if observation.empty else 0),
            scale=self.scale if observation.scale is None else observation.scale,
            cosines=self.cosines if observation.cosines is None else observation.cosines,
        )


Check = Callable[[Comparison, pb.AdmissionSpec], Observation]


def judge(members: Sequence[Member], rules: pb.AdmissionSpec) -> list[Assessment]:
    """Compare contributions, which come in order of arrival and adapt the same modules; a finding each, in that order.

    1. A zero update, and one that an earlier member has sent, are quarantined in cohorts of any size. The rest begins
       with four members left; `cosine` is reported from two on.
    2. Norms: a module far above the cohort's median (`outlier`, in robust standard deviations of log ‖ΔW‖, and more
       than ten times the median) quarantines its member; less far (`clip`) it is scaled down. A module that at most
       half of the members have changed has no median; what is done to it shows in the norm over all.
    3. Direction: the cosine to the mean of the others, all with equal weight, since num_examples is only declared.

    One attacker must not drag honest members below `min_cosine`, so that mean is over a yardstick: as long as somebody
    in it lies below, the one with the lowest *median* cosine to the others leaves it; then everybody is judged by what
    is left. Unlike the mean, the median over pairs hears neither loudness nor coherence, so that a minority leaves even
    where it would outweigh the others. Breaking point: a colluding half. Where no majority agrees, all are the
    yardstick, and it may well leave nobody: that is for the operator. An update of usual size that is orthogonal to
    the others cannot be told from honest data unlike everybody else's.

    In cohorts of more than _JURORS the yardstick begins with so many, drawn by lot (by all norms, which nobody knows
    before the round closes): cost is linear in clients, and the breaking point a half of those drawn.

    An operator's admission changes nobody else's finding: whether it is a good yardstick is judged as for any other.
    """
    if not members:
        return []
    comparison = Comparison.of(members)
    for check in CHECKS.values():
        comparison = comparison.after(check(comparison, rules))
    norms = np.sqrt(np.square(comparison.norms).sum(1)).tolist()
    return [_assessment(comparison, i, norm) for i, norm in enumerate(norms)]


def _repeats(comparison: Comparison, rules: pb.AdmissionSpec) -> Observation:
    """Who changes nothing, or sends what an earlier one has sent."""
    members, norms = comparison.members, comparison.norms
    reasons: dict[int, str] = {}
    for i, member in enumerate(members):
        if not norms[i].any():
            reasons[i] = "it changes nothing"
            continue
        agree = np.isclose(norms[:i], norms[i], rtol=_NORMS_AGREE, atol=0.0).all(1)  # (earlier,)
        for j in np.flatnonzero(agree).tolist():
            if _same(member.adapter, members[j].adapter, comparison.modules, norms[i], norms[j]):
                reasons[i] = f"the same update as {members[j].name}'s"
                break
    return Observation(reasons, empty=True)


def _norms(comparison: Comparison, rules: pb.AdmissionSpec) -> Observation:
    """Whose norms are far above the cohort's."""
    live = comparison.live
    if not comparison.is_cohort:
        return Observation()
    far = _outliers(comparison.norms[live], comparison.modules, rules.outlier)
    return Observation({int(live[i]): reason for i, reason in far.items()})


def _clip(comparison: Comparison, rules: pb.AdmissionSpec) -> Observation:
    """Which modules are above the cohort's by so much that they are scaled down."""
    live, scale = comparison.live, comparison.scale.copy()
    if comparison.is_cohort:
        scale[live] = _clipped(comparison.norms[live], rules.clip)
    return Observation(scale=scale)


def _direction(comparison: Comparison, rules: pb.AdmissionSpec) -> Observation:
    """Who points elsewhere than the mean of the others."""
    live, scale = comparison.live, comparison.scale
    least = rules.min_cosine if comparison.is_cohort and len(live) > 2 else -1.0
    norms = comparison.norms * scale
    cosines = _directions(comparison.members, comparison.modules, norms, scale, live, least)
    reasons = {
        int(i): f"its cosine to the mean of the others is {cosines[i]:.2f}, and the least is {least:g}"
        for i in live[cosines[live] < least]
    }
    return Observation(reasons, cosines=cosines)


CHECKS: dict[str, Check] = {"repeats": _repeats, "norms": _norms, "clip": _clip, "direction": _direction}


def _same(
    first: Update[ModuleUpdate], second: Update[ModuleUpdate], modules: Sequence[str], norms: Floats, others: Floats
) -> bool:
    """Whether the cosine of two updates is nearly 1; the largest module tells most, and mostly alone."""
    least = _SAME * float(np.linalg.norm(norms) * np.linalg.norm(others))
    most = float(norms @ others)
    for k in np.argsort(-norms).tolist():
        product = inner([first.modules[modules[k]]], [second.modules[modules[k]]])[0, 0]
        most -= float(norms[k] * others[k] - product)
        if most < least:
            return False
    return True


def _typical(norms: Floats) -> tuple[Floats, Floats]:
    """Median of log norm and its MAD per module, among the members that changed it; NaN where at most half did."""
    common = 2 * (norms > 0).sum(0) > len(norms)
    median, mad = np.full((2, norms.shape[1]), np.nan)
    logs = np.log(np.where(norms > 0, norms, np.nan)[:, common])
    median[common] = np.nanmedian(logs, axis=0)
    mad[common] = np.nanmedian(np.abs(logs - median[common]), axis=0)
    return median, mad


def _outliers(norms: Floats, modules: Sequence[str], most: float) -> dict[int, str]:
    """Whose norms are far above the median, in a module or over all, and the worst of them."""
    if most <= 0:
        return {}
    norms = np.column_stack([norms, np.sqrt(np.square(norms).sum(1))])
    names = [f"‖ΔW‖ of {module}" for module in modules] + ["‖ΔW‖ over all modules"]
    median, mad = _typical(norms)
    times = norms / np.exp(median)  # NaN without a median, which is never more than anything
    far = (times > _FAR) & (np.log(np.maximum(times, 1.0)) > most * (1.4826 * mad + _FLOOR))
    worst = np.argmax(np.where(far, times, 0.0), axis=1)
    members = [(int(i), names[worst[i]], times[i, worst[i]]) for i in np.flatnonzero(far.any(1))]
    return {i: f"{name} is {factor:.3g} times the cohort's median" for i, name, factor in members}


def _clipped(norms: Floats, clip: float) -> Floats:
    """The factor, at most 1, that brings each module to `clip` medians (clients, modules)."""
    scale = np.ones_like(norms)
    if clip > 0:
        limit = np.broadcast_to(clip * np.exp(_typical(norms)[0]), norms.shape)
        np.divide(limit, norms, out=scale, where=norms > limit)
    return scale


def _directions(
    members: Sequence[Member], modules: Sequence[str], norms: Floats, scale: Floats, live: Indices, least: float
) -> Floats:
    """Cosine to the mean of the others in the yardstick (clients,); NaN where there is none, or no direction."""
    lengths: Floats = np.sqrt(np.square(norms).sum(1))
    if len(live) < 2:
        return np.full(len(members), np.nan)
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(np.sort(lengths).tobytes()).digest()))
    jury = rng.permutation(sorted(live.tolist(), key=lambda i: members[i].id))[:_JURORS]
    others = np.setdiff1d(np.arange(len(members)), jury)

    def products(module: str) -> Floats:
        updates = [member.adapter.modules[module] for member in members]
        jurors, to_jurors = [updates[j] for j in jury], np.empty((len(members), len(jury)))
        to_jurors[jury], to_jurors[others] = inner(jurors), inner([updates[i] for i in others], jurors)
        return to_jurors

    pairs = np.zeros((len(members), len(jury)))  # ⟨ΔWᵢ, ΔWⱼ⟩
    for k, of_module in enumerate(in_parallel(products, modules)):
        pairs += of_module * scale[:, k, None] * scale[jury, k]
    inside = _yardstick(pairs, lengths, jury, least)
    return _cosines(pairs[:, inside].sum(1), lengths, jury[inside])


def _yardstick(pairs: Floats, lengths: Floats, jury: Indices, least: float) -> NDArray[np.bool_]:
    """Which jurors are in the mean that everybody is held against, from their inner products (clients, jurors)."""
    own, lengths = pairs[jury], lengths[jury]
    cosines = own / (lengths[:, None] * lengths)
    np.fill_diagonal(cosines, np.nan)
    inside = np.ones(len(jury), np.bool_)
    while 2 * inside.sum() > max(len(jury), 2):
        to_mean = _cosines(own[:, inside].sum(1), lengths, np.flatnonzero(inside))
        if not (to_mean[inside] < least).any():
            return inside
        medians = np.nanmedian(cosines[:, inside], axis=1)
        inside[np.argmin(np.where(inside, medians, np.inf))] = False
    return np.ones(len(jury), np.bool_)


def _cosines(products: Floats, lengths: Floats, inside: Indices) -> Floats:
    """Cosine of each ΔWᵢ to the sum S of those inside without itself, from ⟨ΔWᵢ, S⟩ and ‖ΔWᵢ‖ (clients,)."""
    own, twice = np.zeros_like(lengths), np.zeros_like(lengths)
    own[inside], twice[inside] = np.square(lengths[inside]), 2 * products[inside]
    whole = products[inside].sum()  # ‖S‖²
    rest = whole - twice + own  # ‖S − ΔWᵢ‖²
    some = (rest > 1e-12 * (whole + own)) & (lengths > 0)
    apart = lengths * np.sqrt(np.maximum(rest, 0.0))
    cosines = np.full_like(lengths, np.nan)
    np.divide(products - own, apart, out=cosines, where=some)
    return np.clip(cosines, -1.0, 1.0, out=cosines)


def _assessment(comparison: Comparison, i: int, norm: float) -> Assessment:
    member, modules, reason = comparison.members[i], comparison.modules, comparison.reasons[i]
    clipped = {module: float(left) for module, left in zip(modules, comparison.scale[i], strict=True) if left < 1.0}
    verdict: Verdict = "quarantined" if reason else "clipped" if clipped else "admitted"
    if verdict == "clipped":
        how = "would be scaled down" if member.by_hand else "scaled down"
        reason = f"{len(clipped)} of {len(modules)} modules {how}, the most by {1 / min(clipped.values()):.1f} times"
    if member.by_hand:
        verdict = "admitted"
    cosine = float(comparison.cosines[i])
    scale = clipped if verdict == "clipped" else {}
    return Assessment(verdict, reason, norm, None if np.isnan(cosine) else cosine, scale)
