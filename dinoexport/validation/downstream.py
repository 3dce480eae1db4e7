"""Downstream agreement: nearest neighbours, k-NN classes, a linear probe, and patch correspondence in a second view.

The family names the features of an item (`family.Uses`). scikit-learn computes each result twice, from PyTorch's
features and from the candidate's. Every figure is the share of equal results: 1 means that all are equal. What too few
items cannot show is left out, or measured with fewer neighbours, and the report says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dinoexport.config.limits import Limit, Limits
from dinoexport.errors import require
from dinoexport.family import Uses
from dinoexport.spec import Array, Arrays, Progress, silent
from dinoexport.validation.judge import Bound, Row, without_nan

PACKAGES = ("sklearn",)
KNN, PROBE = "knn_agreement", "probe_agreement"
NEIGHBOURS = 10
# The weight of a neighbour's vote: exp(cosine / 0.07) (Wu et al. 2018, arXiv:1805.01978, section 3.4).
_TEMPERATURE = 0.07
_FOLDS_MAX = 5
_NAMED_MAX = 5  # items that differ are shown; the JSON has all of them
# Neighbours whose cosines differ by less are equally near, for example copies of one item.
_EQUALLY_NEAR = 1e-9
# MiB that scikit-learn may use for distances at a time: ten thousand items have 800 MB of them.
_DISTANCES_MIB = 128


@dataclass(frozen=True, kw_only=True)
class ItemFeatures:
    """The features of one item. label: its class; empty if it has none.

    reference, candidate: vectors (D,) by name; the candidate's are empty if its output is unusable. matched: the share
    of parts for which both find the same part of the second view; None without a second view.
    """

    name: str
    label: str
    reference: Arrays
    candidate: Arrays
    matched: float | None


@dataclass(frozen=True, kw_only=True)
class Differs:
    """An item with a different result. lost, instead: neighbours that only PyTorch, or only the candidate, finds."""

    item: str
    how: str
    lost: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The share of equal results over `items` items, computed from the features `of`.

    detail: more about the figure. differs: every item with a different result, the worst first. bound: None if the
    validation has no limit for it.
    """

    figure: str
    of: str
    value: float
    items: int
    detail: str
    bound: Bound | None
    differs: tuple[Differs, ...]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """All measures. said: lines about what was left out or reduced, and why."""

    measures: tuple[Measure, ...]
    said: tuple[str, ...]

    @property
    def rows(self) -> tuple[Row, ...]:
        """A row of the report for each measure that has a limit."""
        return tuple(
            Row(
                case=f"all {m.items}",
                why=f"decisions by {m.of}",
                output=m.figure,
                shape=(),
                distance=None,
                bounds=(m.bound,),
            )
            for m in self.measures
            if m.bound is not None
        )

    @property
    def table(self) -> list[dict[str, Any]]:
        """A row for each measure, to be shown."""
        return [
            {
                "measure": m.figure,
                "by": m.of,
                "items": m.items,
                "agreement": f"{m.value:.2%}",
                "limit": "none" if m.bound is None else f"{m.bound.limit:.2%}",
                "differ": len(m.differs),
                "": m.detail,
                "verdict": "no limit" if m.bound is None else "ok" if m.bound.holds else "FAILED",
            }
            for m in self.measures
        ]

    @property
    def lines(self) -> list[str]:
        """What was left out, and the names of the items that differ most."""
        lines = list(self.said)
        for m in self.measures:
            lines += [f"{m.figure} differs: {differs.item}: {differs.how}" for differs in m.differs[:_NAMED_MAX]]
            if len(m.differs) > _NAMED_MAX:
                lines.append(f"{m.figure} differs: and {len(m.differs) - _NAMED_MAX} more; --json names them all")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Every figure and every item that differs, ready for json.dumps."""
        content: dict[str, Any] = without_nan(asdict(self))
        return content


def agreement(uses: Uses, items: Sequence[ItemFeatures], limits: Limits, *, progress: Progress = silent) -> Agreement:
    """Every measure that the items allow: how often candidate and PyTorch give the same result."""
    require("export", *PACKAGES)
    import sklearn

    said: list[str] = []
    usable = [item for item in items if item.candidate]
    if len(usable) < len(items):
        said.append(f"{len(items) - len(usable)} of {len(items)} have no usable output and are left out here")
    if not usable:
        return Agreement(measures=(), said=tuple(said))
    progress("comparing decisions", 0, 0)
    with sklearn.config_context(working_memory=_DISTANCES_MIB):
        found = [
            _recall(uses, usable, limits.recall_min, said),
            *_by_class(uses, usable, limits, said),
            _correspondence(usable, limits.correspondence_min),
        ]
    measures = tuple(measure for measure in found if measure is not None)
    progress("comparing decisions", 1, 1)
    return Agreement(measures=measures, said=tuple(said))


def neighbours_for(count: int) -> int:
    """The number of nearest neighbours to compare among `count` items: at most half of the others.

    The ten nearest of eleven items are all of them, and would agree for any features.
    """
    return min(NEIGHBOURS, (count - 1) // 2)


def _vectors(items: Sequence[ItemFeatures], names: Sequence[str]) -> tuple[Array, Array]:
    """PyTorch's features and the candidate's, (N, D) each, in float64 so that rounding here changes no result."""
    import numpy as np

    def side(features: Sequence[Arrays]) -> Array:
        joined: Array = np.stack([np.concatenate([f[name] for name in names]) for f in features]).astype(np.float64)
        return joined

    return side([item.reference for item in items]), side([item.candidate for item in items])


def _recall(uses: Uses, items: Sequence[ItemFeatures], limit: Limit | None, said: list[str]) -> Measure | None:
    """The share of nearest neighbours in PyTorch's features that are also nearest in the candidate's."""
    import numpy as np
    from sklearn.neighbors import NearestNeighbors
    from sklearn.preprocessing import normalize

    count = neighbours_for(len(items))
    if not count:
        said.append(f"recall: left out, because it needs 3 items and there are {len(items)}")
        return None
    if count < NEIGHBOURS:
        said.append(
            f"recall: of the {count} nearest, not {NEIGHBOURS}, because there are only {len(items)}; "
            f"{NEIGHBOURS} needs {2 * NEIGHBOURS + 1}"
        )
    exact, ours = _vectors(items, uses.neighbours_by)
    search = NearestNeighbors(n_neighbors=count, metric="cosine")
    nearest_NK = search.fit(exact).kneighbors(return_distance=False)
    found_NK = search.fit(ours).kneighbors(return_distance=False)
    unit = normalize(exact)
    kept = np.empty(len(items))
    differs: list[Differs | None] = []
    for i, (nearest_K, found_K) in enumerate(zip(nearest_NK, found_NK, strict=True)):
        farthest = (unit[nearest_K] @ unit[i]).min()
        kept[i] = (unit[found_K] @ unit[i] >= farthest - _EQUALLY_NEAR).mean()
        lost = tuple(items[j].name for j in nearest_K if j not in found_K)
        instead = tuple(items[j].name for j in found_K if j not in nearest_K)
        how = f"{round(kept[i] * count)} of {count} kept, lost: {', '.join(lost)}"
        differs.append(Differs(item=items[i].name, how=how, lost=lost, instead=instead) if kept[i] < 1 else None)
    worst_first = [differs[i] for i in np.argsort(kept, kind="stable")]
    return _measure(
        "recall",
        uses.neighbours_by,
        kept,
        _granting(limit, len(items) * count, "recall", said),
        f"of the {count} nearest neighbours by cosine",
        [found for found in worst_first if found is not None],
    )


def _by_class(uses: Uses, items: Sequence[ItemFeatures], limits: Limits, said: list[str]) -> tuple[Measure | None, ...]:
    """The measures that need classes of at least two items."""
    sizes = Counter(item.label for item in items if item.label)
    alone = sorted(label for label, size in sizes.items() if size < 2)
    labelled = [item for item in items if sizes[item.label] > 1 and item.label]
    what = "k-NN classification and linear probe"
    if sizes and (without := sum(not item.label for item in items)):
        said.append(f"{what}: items without a class are left out: {without}")
    if alone:
        said.append(f"{what}: left out, because no other item of their class remains to learn from: {', '.join(alone)}")
    if len({item.label for item in labelled}) < 2:
        said.append(f"{what}: left out, because it needs two classes (subfolders) with at least two items each")
        return ()
    knn_limit = _granting(limits.knn_agreement_min, len(labelled), KNN, said)
    probe_limit = _granting(limits.probe_agreement_min, len(labelled), PROBE, said)
    return _knn(uses, labelled, knn_limit, said), _probe(uses, labelled, probe_limit)


def _knn(uses: Uses, items: Sequence[ItemFeatures], limit: Limit | None, said: list[str]) -> Measure:
    """k-NN: each item gets the class of its nearest neighbours, once with each side's features."""
    import numpy as np
    from sklearn.neighbors import KNeighborsClassifier

    count = neighbours_for(len(items))
    if count < NEIGHBOURS:
        said.append(
            f"k-NN classification: by the {count} nearest, not {NEIGHBOURS}, because there are only {len(items)}"
        )
    labels = np.array([item.label for item in items])

    def vote(distances: Array) -> Array:
        weights: Array = np.exp(-distances / _TEMPERATURE)
        return weights

    classifier = KNeighborsClassifier(n_neighbors=count, metric="cosine", weights=vote)
    # Without a split, each item is classified by all the others.
    exact, ours = (classifier.fit(side, labels).predict(None) for side in _vectors(items, uses.neighbours_by))
    return _decided(KNN, uses.neighbours_by, items, labels, exact, ours, limit, f"by {count} neighbours")


def _probe(uses: Uses, items: Sequence[ItemFeatures], limit: Limit | None) -> Measure:
    """Linear probe: fitted on PyTorch's features of some items, it classifies the others from both sides' features.

    Ridge regression has one solution, needs no random start, and takes seconds for ten thousand items.
    """
    import numpy as np
    from sklearn.linear_model import RidgeClassifier
    from sklearn.model_selection import StratifiedKFold

    labels = np.array([item.label for item in items])
    exact, ours = _vectors(items, uses.classified_by)
    folds = min(_FOLDS_MAX, *Counter(labels.tolist()).values())
    said_of_exact, said_of_ours = labels.copy(), labels.copy()
    for fitted, asked in StratifiedKFold(n_splits=folds).split(exact, labels):
        classifier = RidgeClassifier().fit(exact[fitted], labels[fitted])
        said_of_exact[asked], said_of_ours[asked] = classifier.predict(exact[asked]), classifier.predict(ours[asked])
    return _decided(PROBE, uses.classified_by, items, labels, said_of_exact, said_of_ours, limit, f"in {folds} folds")


def _decided(
    figure: str,
    names: Sequence[str],
    items: Sequence[ItemFeatures],
    labels: Array,
    exact: Array,
    ours: Array,
    limit: Limit | None,
    how: str,
) -> Measure:
    differs = [
        Differs(item=item.name, how=f"PyTorch says {theirs}, the candidate {said}; it is {item.label}")
        for item, theirs, said in zip(items, exact.tolist(), ours.tolist(), strict=True)
        if theirs != said
    ]
    right = f"right: PyTorch {(exact == labels).mean():.1%}, candidate {(ours == labels).mean():.1%}"
    return _measure(figure, names, exact == ours, limit, f"{how}; {right}", differs)


def _correspondence(items: Sequence[ItemFeatures], limit: Limit | None) -> Measure | None:
    """The share of parts whose nearest part in the second view is the same for both sides."""
    import numpy as np

    shares = {item.name: item.matched for item in items if item.matched is not None}
    if not shares:
        return None
    worst_first = sorted((share, name) for name, share in shares.items() if share < 1)
    return _measure(
        "correspondence",
        (),
        np.array(list(shares.values())),
        limit,
        f"nearest part in a second view; worst {min(shares.values()):.1%}",
        [Differs(item=name, how=f"{1 - share:.1%} of its parts have a different match") for share, name in worst_first],
    )


def _granting(limit: Limit | None, decisions: int, figure: str, said: list[str]) -> Limit | None:
    """The limit for few results: one different result proves nothing, unless the limit is 1 and allows none."""
    if limit is None or limit.value == 1 or limit.value <= 1 - 1 / decisions:
        return limit
    said.append(f"{figure}: one of {decisions} decisions may differ, though the limit is {limit.value:g}")
    return limit.changed(value=1 - 1 / decisions)


def _measure(
    figure: str, names: Sequence[str], equal: Array, limit: Limit | None, detail: str, differs: Sequence[Differs]
) -> Measure:
    value = float(equal.mean())
    bound = None
    if limit is not None:
        bound = Bound(
            figure=f"{figure}_min",
            value=value,
            limit=limit.value,
            reason=limit.reason,
            holds=value >= limit.value,
        )
    return Measure(
        figure=figure,
        of=" + ".join(names) or "parts",
        value=value,
        items=len(equal),
        detail=detail,
        bound=bound,
        differs=tuple(differs),
    )
