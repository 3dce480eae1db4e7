"""The interface of a model family, and the registry that finds one.

A family is a package that registers a `Family` under the entry-point group `dinoexport.families`. The rest of
dinoexport knows families only through these protocols, so a decoder with a cache is added as files, without an edit
here.
Nothing but `reference`, `upstream` and a piece's module may import torch: a bundle is validated on machines without it.
"""

from dinoexport.family.pieces import OPSET, Call, Example, Piece, Read, Shapes
from dinoexport.family.registry import (
    GROUP,
    DescribesWeights,
    Description,
    Fact,
    Family,
    SplitsTensors,
    code_of,
    find,
    installed,
    split_axis,
)
from dinoexport.family.roles import (
    CaseSource,
    Exportable,
    FinishesAnswers,
    Fittable,
    FrontEnd,
    HasCompanionFiles,
    HasEngineForm,
    HeadWeights,
    Model,
    Oracle,
    PreparesSizes,
    Reported,
    Rollout,
    Runnable,
    Servable,
    SizedWeights,
    TextRole,
    Uses,
    WeightLayout,
)

__all__ = [
    "GROUP",
    "OPSET",
    "Call",
    "CaseSource",
    "DescribesWeights",
    "Description",
    "Example",
    "Exportable",
    "Fact",
    "Family",
    "FinishesAnswers",
    "Fittable",
    "FrontEnd",
    "HasCompanionFiles",
    "HasEngineForm",
    "HeadWeights",
    "Model",
    "Oracle",
    "Piece",
    "PreparesSizes",
    "Read",
    "Reported",
    "Rollout",
    "Runnable",
    "Servable",
    "Shapes",
    "SizedWeights",
    "SplitsTensors",
    "TextRole",
    "Uses",
    "WeightLayout",
    "code_of",
    "find",
    "installed",
    "split_axis",
]
