"""Check a served text model: run the bundle's own prompts greedily and compare with PyTorch token by token.

A roll-out is compared up to the first difference, because until then both read the same tokens. At the difference,
PyTorch's own gap between the two tokens distinguishes rounding (a narrow gap) from damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dinoexport.bundle.reference_file import Reference
from dinoexport.config.limits import Limit, Limits
from dinoexport.errors import InputRefused
from dinoexport.family import TextRole
from dinoexport.serving.text_client import Ended, TextClient
from dinoexport.spec import Array, Expectation, Progress
from dinoexport.text import prompts, tokenizer
from dinoexport.validation.judge import Bound, Report, Row

# The default if the limits name no gap: rounding in fp32 exchanged PyTorch's best two at this distance, in nats.
_GAP_MAX = 0.01
_GAP_REASON = "rounding decides between PyTorch's two likeliest tokens at this distance; defects gave 3.8 and more"


def judged(
    client: TextClient, role: TextRole, reference: Reference, tokenizer_path: Path, name: str, *, progress: Progress
) -> Report:
    """The report on a served text model: a row for each prompt with a continuation in the reference."""
    words = tokenizer.load(tokenizer_path)
    ends = prompts.end_ids(words, role.prompts.completion(""))
    rows = []
    for done, expectation in enumerate(reference.expectations, start=1):
        rows += _rows(client, role, expectation, reference.limits, ends)
        progress(f"checking {name}", done, len(reference.expectations))
    return Report(candidate=name, reference=reference.name, rows=tuple(rows))


def _rows(
    client: TextClient, role: TextRole, expectation: Expectation, limits: Limits, ends: frozenset[int]
) -> list[Row]:
    asked = role.rollout(expectation.case.inputs)
    if asked is None:
        return []
    found = []
    for place, ids in enumerate(asked.prompts):
        wanted_N = expectation.outputs[asked.tokens][place].astype(int)
        logits_NV = expectation.outputs[asked.logits][place]
        output = f"tokens of prompt {place + 1}"
        shape = (len(wanted_N),)
        try:
            answer = client.answer(prompt_ids=list(ids), max_tokens=len(wanted_N))
            gap = gap_at_difference(answer.ended, wanted_N, logits_NV, ends)
            problem = ""
        except InputRefused as refused:
            gap, problem = float("nan"), refused.message
        limit: Limit | None = getattr(limits, "top1_gap_max", None)
        bound = Bound(
            figure="gap at the first difference",
            value=gap,
            limit=limit.value if limit else _GAP_MAX,
            reason=limit.reason if limit else _GAP_REASON,
            holds=gap <= (limit.value if limit else _GAP_MAX),
        )
        found.append(
            Row(
                case=expectation.case.name,
                why=expectation.case.why,
                output=output,
                shape=shape,
                distance=None,
                bounds=(bound,),
                problem=problem,
            )
        )
    return found


def gap_at_difference(ended: Ended, wanted: Sequence[int] | Array, logits_NV: Array, ends: frozenset[int]) -> float:
    """PyTorch's lead of its most likely token over the written one at the first difference; 0 if there is none.

    An answer that ended early chose the most likely of `ends`. Infinite if it broke off without a reason.
    """
    for place, token_id in enumerate(ended.token_ids):
        if token_id != wanted[place]:
            return float(logits_NV[place].max() - logits_NV[place][token_id])
    place = len(ended.token_ids)
    if place == len(wanted):
        return 0.0
    if ended.reason != "stop":
        return float("inf")
    return float(logits_NV[place].max() - max(logits_NV[place][end] for end in ends))
