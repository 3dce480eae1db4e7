"""Classifiers on frozen features: logistic regression, fitted by scikit-learn, and weighted k-NN.

`logreg`: features as they are, float64, L2 penalty; C is chosen by cross-validation, then all are fitted. `linear`: the
same on standardised features, with the scale folded back into the weights. `knn`: normalised features, the nearest
vote with weights softmax(cosine / 0.07), the rule and temperature of Wu et al. 2018 (arXiv:1805.01978). The softmax is
over the k nearest alone, so that the weights sum to one; no decision depends on that. Which outputs are the features is
the family's choice, `Model.fits`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any, Literal

from dinoexport.errors import UsageError
from dinoexport.spec import Array

HeadKind = Literal["logreg", "linear", "knn"]
HEAD_KINDS: tuple[HeadKind, ...] = ("logreg", "linear", "knn")
PACKAGES = ("sklearn",)
# The usual 45 values over 1e-6 to 1e5 take four times as long; on Gaussian classes these chose the same.
C_VALUES = tuple(10.0**exponent for exponent in (-5, -4.25, -3.5, -2.75, -2, -1.25, -0.5, 0.25, 1, 1.75, 2.5, 3))
_FOLDS_MAX = 5
_ITERATIONS = 1000
_TEMPERATURE = 0.07
_NEIGHBOURS = 20
_WILSON_Z = 1.959963984540054  # 95 %


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A classifier as plain arrays. tensors: under the family's names for a fitted head. facts: what was chosen.

    table: the recipe's `[head]` without kind and classes.
    """

    tensors: Mapping[str, Array]
    facts: Mapping[str, Any]
    table: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class HeldOutScores:
    """The classifier's accuracy on images it was not fitted on. interval: Wilson's, 95 %.

    recall: by class. counts: images by class. confusions: (image, its class, the class it was given, with which
    probability), worst first.
    """

    images: int
    right: int
    accuracy: float
    interval: tuple[float, float]
    recall: Mapping[str, float]
    counts: Mapping[str, int]
    confusions: tuple[tuple[str, str, str, float], ...]


def fit(kind: HeadKind, features_ND: Array, labels_N: Array, *, classes: int, balanced: bool, seed: int) -> Fitted:
    """Fits one classifier with one thread, because sums in another order would give other bytes."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        if kind == "knn":
            return _neighbours(features_ND, labels_N, classes)
        return _regression(kind, features_ND, labels_N, balanced=balanced, seed=seed)


def probabilities(kind: HeadKind, fitted: Fitted, features_ND: Array) -> Array:
    """Probabilities (N, K) in float64, computed by the definition and not by a graph."""
    import numpy as np

    features = features_ND.astype(np.float64)
    if kind != "knn":
        logits = features @ fitted.tensors["fitted.weight"].astype(np.float64).T
        return _softmax(logits + fitted.tensors["fitted.bias"].astype(np.float64))
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines = unit @ fitted.tensors["fitted.bank"].astype(np.float64).T
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, : fitted.table["neighbours"]]
    weights = _softmax(np.take_along_axis(cosines, nearest, axis=1) / fitted.table["temperature"])
    votes: Array = fitted.tensors["fitted.votes"].astype(np.float64)[nearest]
    summed: Array = (weights[:, :, None] * votes).sum(axis=1)
    return summed


def judge(
    probabilities_NK: Array, labels: Sequence[str], names: Sequence[str], classes: Sequence[str]
) -> HeldOutScores:
    """Evaluates the probabilities of held-out images; `names` are the images'."""
    given = [classes[k] for k in probabilities_NK.argmax(axis=1)]
    counts = Counter(labels)
    hits = Counter(true for ours, true in zip(given, labels, strict=True) if ours == true)
    right = hits.total()
    wrong = [
        (name, true, ours, float(best))
        for name, true, ours, best in zip(names, labels, given, probabilities_NK.max(axis=1), strict=True)
        if true != ours
    ]
    return HeldOutScores(
        images=len(labels),
        right=right,
        accuracy=right / len(labels),
        interval=wilson(right, len(labels)),
        recall={label: hits[label] / counts[label] for label in classes},
        counts={label: counts[label] for label in classes},
        confusions=tuple(sorted(wrong, key=lambda row: (-row[3], row[0]))),
    )


def wilson(right: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927). At 0 and 1 the normal interval would have no width."""
    z2, share = _WILSON_Z**2, right / of
    middle = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _WILSON_Z * sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    return max(0.0, middle - half), min(1.0, middle + half)


def _regression(kind: HeadKind, features_ND: Array, labels_N: Array, *, balanced: bool, seed: int) -> Fitted:
    import numpy as np

    features = features_ND.astype(np.float64)
    mean, scale = np.zeros(features.shape[1]), np.ones(features.shape[1])
    if kind == "linear":
        mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-12)
    standard = (features - mean) / scale
    chosen, scores = _chosen_c(standard, labels_N, balanced=balanced, seed=seed)
    model = _solved(standard, labels_N, chosen, balanced=balanced)
    weight, bias = model.coef_ / scale, model.intercept_ - (model.coef_ / scale) @ mean
    if len(weight) == 1:  # of two classes scikit-learn keeps one logit, z: a softmax over -z/2 and z/2 is its sigmoid
        weight, bias = np.concatenate((-weight, weight)) / 2, np.concatenate((-bias, bias)) / 2
    return Fitted(
        tensors={"fitted.weight": weight.astype(np.float32), "fitted.bias": bias.astype(np.float32)},
        facts={"C": chosen, "accuracy_by_C": scores, "balanced": balanced},
    )


def _chosen_c(features_ND: Array, labels_N: Array, *, balanced: bool, seed: int) -> tuple[float, dict[str, float]]:
    """The C with the best mean accuracy over stratified folds, the smaller of equals; 1 where folds are impossible."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold

    folds = min(_FOLDS_MAX, int(np.bincount(labels_N).min()))
    if folds < 2:
        return 1.0, {}
    scores = {}
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(features_ND, labels_N))
    for c in C_VALUES:
        right = [
            _solved(features_ND[train], labels_N[train], c, balanced=balanced).score(features_ND[test], labels_N[test])
            for train, test in splits
        ]
        scores[f"{c:.3g}"] = float(np.mean(right))
    best = max(scores.values())
    return next(c for c in C_VALUES if scores[f"{c:.3g}"] == best), scores


def _solved(features_ND: Array, labels_N: Array, c: float, *, balanced: bool) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=c, max_iter=_ITERATIONS, class_weight="balanced" if balanced else None)
    with warnings.catch_warnings():
        # Separable classes with almost no regularisation do not converge; the result of a thousand steps is evaluated.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features_ND, labels_N)


def _neighbours(features_ND: Array, labels_N: Array, classes: int) -> Fitted:
    import numpy as np

    features = features_ND.astype(np.float64)
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    if not (lengths > 0).all():
        raise UsageError("An image's features are all zero.", next_step="Look at the bundle: dinoexport validate.")
    count = min(_NEIGHBOURS, int(np.bincount(labels_N, minlength=classes).min()))
    # The graph stores these in fp16, so the values compared with it are rounded in the same way.
    bank = (features / lengths).astype(np.float16).astype(np.float32)
    table = {"bank": len(bank), "neighbours": count, "temperature": _TEMPERATURE}
    votes = np.eye(classes, dtype=np.float32)[labels_N]
    return Fitted(tensors={"fitted.bank": bank, "fitted.votes": votes}, facts=table, table=table)


def _softmax(logits_NK: Array) -> Array:
    import numpy as np

    raised = np.exp(logits_NK - logits_NK.max(axis=1, keepdims=True))
    shares: Array = raised / raised.sum(axis=1, keepdims=True)
    return shares
