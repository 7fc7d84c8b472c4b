"""A job that starts from an earlier update, rather than from ΔW₀ = 0: what its clients changed, ΔWᵢ − ΔW₀.

Contributions hold the start too. A mean of them needs to know nothing of it, since Σ pᵢ (ΔWᵢ − ΔW₀) + ΔW₀ = Σ pᵢ ΔWᵢ;
what looks at how large an update is, or where it points, has to look at the change. No ΔW is formed: a change is the
client's tensors and the start's, which stay in their files.
"""

from __future__ import annotations

from collections.abc import Mapping

from converters.updates.update import LazyUpdates, M, Update


def change(mine: M, start: M) -> M:
    """ΔWᵢ − ΔW₀ of one module, of rank rᵢ + r₀ if it has one. Exactly zero where no tensor was changed."""
    if mine.equals(start):
        return mine.sum([mine], [0.0])
    return mine.sum([mine, start], [1.0, -1.0])


def changes(whole: Update[M], start: Update[M] | None) -> Update[M]:
    """What a client changed, module by module when it is asked for; without a start, all that it sent."""
    if start is None:
        return whole
    mine, first = whole.modules, start.modules
    return Update(LazyUpdates(mine, lambda name: change(mine[name], first[name])))


def clipped(whole: Update[M], scale: Mapping[str, float], start: Update[M] | None, *, by_factor: bool) -> Update[M]:
    """An update with what was changed scaled down, in the modules that `scale` names.

    ΔW₀ + s (ΔWᵢ − ΔW₀), of rank rᵢ + r₀; `by_factor`: A₀ + s (Aᵢ − A₀) and B likewise, of the start's own rank, for
    methods that average each tensor by itself. Where A is frozen the two are the same.
    """
    if not scale:
        return whole
    mine = whole.modules

    def module(name: str) -> M:
        update, share = mine[name], scale.get(name, 1.0)
        if start is None or share == 1.0:
            return update.sum([update], [share])
        first = start.modules[name]
        if by_factor:
            return update.between(first, share)
        return update.sum([update, first], [share, 1.0 - share])

    return Update(LazyUpdates(mine, module))
