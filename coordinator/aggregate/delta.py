"""A job that starts from an adapter, rather than from ΔW₀ = 0: what its clients changed, ΔWᵢ − ΔW₀.

Contributions hold the start too. A mean of them needs to know nothing of it, since Σ pᵢ (ΔWᵢ − ΔW₀) + ΔW₀ = Σ pᵢ ΔWᵢ;
what looks at how large an update is, or where it points, has to look at the change. No ΔW is formed: a change is the
client's factors and the start's, which stay in their files.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from converters.adapter import Adapter, LazyUpdates, LowRank

_NOTHING = 1e-9  # a weight that is left when those of a cohort, which are shares, have cancelled


def change(mine: LowRank, start: LowRank) -> LowRank:
    """ΔWᵢ − ΔW₀ of one module: a (rᵢ + r₀, in), b (out, rᵢ + r₀). Exactly zero where no factor was changed."""
    same = np.array_equal(mine.b, start.b) and np.array_equal(mine.a, start.a)
    mine.forget()
    return LowRank.sum([mine], [0.0]) if same else LowRank.sum([mine, start], [1.0, -1.0])


def changes(whole: Adapter, start: Adapter | None) -> Adapter:
    """What a client changed, module by module when it is asked for; without a start, all that it sent."""
    if start is None:
        return whole
    mine, first = whole.modules, start.modules
    return Adapter(LazyUpdates(mine, lambda name: change(mine[name], first[name])))


def clipped(whole: Adapter, scale: Mapping[str, float], start: Adapter | None, *, by_factor: bool) -> Adapter:
    """An adapter with what was changed scaled down, in the modules that `scale` names.

    ΔW₀ + s (ΔWᵢ − ΔW₀), of rank rᵢ + r₀; `by_factor`: A₀ + s (Aᵢ − A₀) and B likewise, of the start's own rank, for
    methods that average factors. Where A is frozen the two are the same.
    """
    if not scale:
        return whole
    mine = whole.modules

    def module(name: str) -> LowRank:
        update, share = mine[name], scale.get(name, 1.0)
        if start is None or share == 1.0:
            return LowRank.sum([update], [share])
        first = start.modules[name]
        if not by_factor:
            return LowRank.sum([update, first], [share, 1.0 - share])
        s = np.float32(share)
        return LowRank(first.a + s * (update.a - first.a), first.b + s * (update.b - first.b))

    return Adapter(LazyUpdates(mine, module))


def joined(update: LowRank, start: LowRank, weight: float) -> LowRank:
    """update + weight · ΔW₀. The start's factors are in it once, however many terms of the update are the start
    already, and not at all where they cancel."""
    (first,) = start.terms
    others = [term for term in update.terms if term.a is not first.a or term.b is not first.b]
    weight += sum(term.weight for term in update.terms if term.a is first.a and term.b is first.b) / first.weight
    parts = [LowRank(*term) for term in others]
    if others and abs(weight) < _NOTHING:
        return LowRank.sum(parts, [1.0] * len(parts))
    return LowRank.sum([*parts, start], [*[1.0] * len(parts), weight])
