"""The loop that writes: answers that go on together are those they are alone; stops, limits, cancelling."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dinoexport.errors import InputRefused, ValidationFailed
from dinoexport.runtime.decoding import ArrayDecoder
from dinoexport.text import generation, tokenizer
from dinoexport.text.decoder import PaddedRows, SteppedDecoder
from dinoexport.text.detokenise import StopStrings
from dinoexport.text.generation import Answer, Batch, Task, Written
from dinoexport.text.prompts import Control, Prompt, Text
from dinoexport.text.sampling import Sampling
from tests.properties import examples
from tests.text import tiny

PROMPTS = ("def add(a, b):", "x", "The capital of France is", "éß🙂 and more than one byte a letter")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    return tokenizer.load(tiny.tokenizer_json(tmp_path_factory.mktemp("tiny")))


def prompt(text: str, *, ends: tuple[str, ...] = ("</s>",)) -> Prompt:
    return Prompt(parts=(Control("<s>"), Text(text)), ends=ends, continuing=True)


def task(words: tokenizer.Tokenizer, text: str, sampling: Sampling | None = None) -> Task:
    return generation.task_of(words, tiny.decoder(), prompt(text), sampling or Sampling(max_tokens=20))


def alone(words: tokenizer.Tokenizer, one: Task) -> Written:
    """The plain way: no cache, no batch, everything again for each token."""
    run, ids, generator = tiny.Tiny(), list(one.prompt_ids), one.sampling.generator()
    written = []
    while len(written) < one.limit:
        empty = np.zeros((1, tiny.HEADS, 0, tiny.WIDTH), np.float32)
        inputs = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        logits = run(inputs | {f"past_key_values.0.{kind}": empty for kind in ("key", "value")})["logits"]
        token_id = generation.choose(logits[0, -1], one.sampling, generator)
        if token_id in one.end_ids:
            break
        written.append(token_id)
        ids.append(token_id)
    return written


def run(batch: Batch, answers: list[Answer], arrivals: list[int] | None = None) -> list[str]:
    """Everything the answers showed; answer i joins before iteration arrivals[i]."""
    shown = {id(answer): "" for answer in answers}
    waiting = list(zip(answers, arrivals or [0] * len(answers), strict=True))
    for iteration in range(1000):
        for answer, at in list(waiting):
            if at <= iteration and len(batch) < batch.slots:
                batch.add(answer)
                waiting.remove((answer, at))
        for answer, text in batch.iterate():
            shown[id(answer)] += text
        if not len(batch) and not waiting:
            return [shown[id(answer)] for answer in answers]
    raise AssertionError("it never ends")


@pytest.mark.parametrize("chunk", [1, 3, 512])
@pytest.mark.parametrize("arrivals", [[0, 0, 0, 0], [0, 2, 3, 11], [5, 4, 0, 1]])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_together_as_alone(words, chunk: int, arrivals: list[int], temperature: float) -> None:
    """Unequal prompts, arrivals and lengths: padding, joining and leaving change no token."""
    tasks = [
        task(words, text, Sampling(max_tokens=5 + 6 * i, temperature=temperature, seed=i))
        for i, text in enumerate(PROMPTS)
    ]
    run_of = tiny.Tiny()
    decoder = tiny.decoder_of(run_of, chunk=chunk)
    answers = [Answer(words, one) for one in tasks]
    shown = run(Batch(decoder), answers, arrivals)
    for answer, text, one in zip(answers, shown, tasks, strict=True):
        assert list(answer.written().ids) == alone(words, one)
        assert text == answer.written().text == words.decode(answer.ids)
    assert max(batch for batch, _, _ in run_of.calls) >= 3 or chunk < 512
    assert max(length for _, length, _ in run_of.calls) <= chunk


def test_a_batch_is_filled_again(words) -> None:
    tasks = [task(words, PROMPTS[i % 4] + str(i), Sampling(max_tokens=3 + i % 5)) for i in range(11)]
    answers = [Answer(words, one) for one in tasks]
    run(Batch(tiny.decoder(), slots=3), answers)
    assert [list(answer.ids) for answer in answers] == [alone(words, one) for one in tasks]


def test_write_streams_what_it_returns(words) -> None:
    *pieces, written = generation.write(words, tiny.decoder(), task(words, PROMPTS[0]))
    assert "".join(pieces) == written.text
    assert len(pieces) > 2
    assert written.reason == "length"
    assert written.prompt_tokens == 1 + len(PROMPTS[0])
    assert len(written.ids) == 20


def test_times_are_from_when_the_answer_was_asked_for(words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its first token, which its prompt may wait for, and of its end."""
    now = [50.0]
    monkeypatch.setattr(generation.time, "monotonic", lambda: now[0])
    answer = Answer(words, task(words, PROMPTS[0], Sampling(max_tokens=3)))
    for step, seconds in enumerate((7.0, 1.0, 1.5)):
        now[0] += seconds
        answer.accept(np.eye(words.size, dtype=np.float32)[40 + step])
    now[0] += 0.25
    written = answer.written()
    assert (len(written.ids), written.first_s, written.seconds) == (3, 7.0, 9.75)


def test_an_end_token_ends_and_is_not_shown(words) -> None:
    ids = list(generation.write(words, tiny.decoder(), task(words, PROMPTS[0])))[-1].ids
    assert len(set(ids)) > 3
    end = next(token_id for token_id in ids[2:] if token_id not in ids[:2])
    one = task(words, PROMPTS[0])
    one = Task(prompt_ids=one.prompt_ids, end_ids=frozenset({end}), continuing=True, sampling=one.sampling, limit=20)
    written = list(generation.write(words, tiny.decoder(), one))[-1]
    assert written.reason == "stop"
    assert written.ids == ids[: ids.index(end)]


def test_a_stop_string_ends_and_none_of_it_is_shown(words) -> None:
    whole = list(generation.write(words, tiny.decoder(), task(words, PROMPTS[0])))[-1].text
    stop = whole[4:7]
    *pieces, written = generation.write(
        words, tiny.decoder(), task(words, PROMPTS[0], Sampling(max_tokens=20, stop=("never", stop)))
    )
    assert "".join(pieces) == written.text == whole[: whole.index(stop)]
    assert written.reason == "stop"


@given(
    text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3), cuts=st.data()
)
@examples(200)
def test_stop_strings_cut_at_the_first(text: str, stops: list[str], cuts) -> None:
    """However the text comes, what is shown ends where the first stop string begins, and is never taken back."""
    found = StopStrings(stops)
    shown, left, came = "", text, ""
    while left and not found.stopped:
        n = cuts.draw(st.integers(1, len(left)))
        came += left[:n]
        shown += found.push(left[:n])
        left = left[n:]
        assert came.startswith(shown)
    shown += found.finish()
    firsts = [at for stop in stops if (at := came.find(stop)) >= 0]
    assert shown == (came[: min(firsts)] if firsts else text)


def test_the_context_is_the_limit(words) -> None:
    one = task(words, "a" * (tiny.CONTEXT - 4), Sampling(max_tokens=50))
    written = list(generation.write(words, tiny.decoder(), one))[-1]
    assert (written.reason, len(written.ids)) == ("length", 3)
    with pytest.raises(InputRefused, match="96 tokens; the model takes 96"):
        task(words, "a" * (tiny.CONTEXT - 1))


def test_a_cache_that_fits_no_memory_is_refused(words, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 bytes a token: so many are free that 30 tokens fit, and the prompt has 11."""
    monkeypatch.setattr("dinoexport.system.memory.available_bytes", lambda: 30 * 128)
    assert task(words, "a" * 10, Sampling(max_tokens=19)).limit == 19
    with pytest.raises(InputRefused, match="prompt of 11 tokens and an answer of up to 20 takes") as refused:
        task(words, "a" * 10, Sampling(max_tokens=20))
    assert refused.value.next_step == "Set max_tokens to 19 or less."
    with pytest.raises(InputRefused, match="memory are free") as refused:
        task(words, "a" * 40)
    assert refused.value.next_step == "Shorten the prompt, or free memory."
    monkeypatch.setattr("dinoexport.system.memory.available_bytes", lambda: None)
    assert task(words, "a" * 10, Sampling(max_tokens=20)).limit == 20


@pytest.mark.parametrize(
    ("free_bytes", "limit", "next_step"),
    [
        (2_300_000_000, 20, ""),
        (2_299_999_999, 20, "Set max_tokens to 19 or less."),
        (400_000_000, 20, "Set max_tokens to 1 or less."),
        (399_999_999, 20, "Shorten the prompt, or free memory."),
    ],
)
def test_memory_for_a_cache_in_words(
    free_bytes: int, limit: int, next_step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 MB a token, for three and an answer of twenty."""
    decoder = SteppedDecoder(begin_steps=pytest.fail, vocabulary=9, context=100, token_bytes=10**8)
    assert decoder.chunk == 512
    monkeypatch.setattr("dinoexport.system.memory.available_bytes", lambda: free_bytes)

    def task_of() -> Task:
        return generation.task_of_ids(decoder, [1, 2, 3], frozenset(), Sampling(max_tokens=limit), continuing=True)

    if not next_step:
        assert task_of().limit == limit
        return
    with pytest.raises(InputRefused) as refused:
        task_of()
    assert refused.value.message == (
        "The cache of a prompt of 3 tokens and an answer of up to 20 takes 2.30 GB; "
        f"{free_bytes / 1e9:.2f} GB of memory are free."
    )
    assert refused.value.next_step == next_step


def test_memory_is_said_in_thousand_millions(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = SteppedDecoder(begin_steps=pytest.fail, vocabulary=9, context=100, token_bytes=10**17)
    monkeypatch.setattr("dinoexport.system.memory.available_bytes", lambda: 10**18)
    with pytest.raises(InputRefused, match=r" takes 2300000000\.00 GB; 1000000000\.00 GB of memory are free\.$"):
        generation.task_of_ids(decoder, [1, 2, 3], frozenset(), Sampling(max_tokens=20), continuing=True)


def test_ids_and_room_at_their_limits() -> None:
    """One token of room is enough; ids are from 0 up to the vocabulary."""
    decoder = tiny.decoder()

    def limit(*ids: int) -> int:
        return generation.task_of_ids(decoder, ids, frozenset(), Sampling(max_tokens=9), continuing=True).limit

    assert limit(0, tiny.VOCABULARY - 1) == 9 and limit(*[5] * (tiny.CONTEXT - 1)) == 1
    for wrong in (-1, tiny.VOCABULARY):
        with pytest.raises(InputRefused, match=f"The model has no token {wrong}"):
            limit(3, wrong)
    with pytest.raises(InputRefused, match="the model takes 96, the answer included"):
        limit(*[5] * tiny.CONTEXT)
    with pytest.raises(InputRefused, match="empty"):
        limit()


def test_an_answer_that_never_began(words) -> None:
    answer = Answer(words, task(words, "a"))
    answer.cancel()
    written = answer.written()
    assert (written.text, written.reason, written.ids, written.first_s) == ("", "cancelled", (), 0.0)


def test_a_full_batch_takes_no_more(words) -> None:
    batch = Batch(tiny.decoder(), slots=2)
    for _ in range(2):
        batch.add(Answer(words, task(words, "a")))
    with pytest.raises(AssertionError, match="there is room"):
        batch.add(Answer(words, task(words, "a")))


def test_a_cache_is_moved_only_when_an_answer_ends(words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its move costs as much as many tokens."""
    kept: list[list[int]] = []
    plain = PaddedRows.keep
    monkeypatch.setattr(PaddedRows, "keep", lambda rows, places: kept.append(list(places)) or plain(rows, places))
    answers = [Answer(words, task(words, "a", Sampling(max_tokens=n))) for n in (9, 4, 9)]
    run(Batch(tiny.decoder()), answers)
    assert kept == [[0, 2], [1]] and [len(answer.ids) for answer in answers] == [9, 4, 9]


def test_sequences_without_common_padding_are_only_reordered() -> None:
    """Padding that all have is cut off; else the runtime's own reordering is used."""
    moved: list[str] = []

    class Watched(ArrayDecoder):
        def reorder(self, rows) -> None:
            moved.append(f"reorder {list(rows)}")
            super().reorder(rows)

        def resume(self, carried) -> None:
            moved.append(f"resume {next(iter(carried.values())).shape}")
            super().resume(carried)

    def begun(length: int) -> PaddedRows:
        rows = PaddedRows(Watched(tiny.Tiny(), tiny.GRAPH))
        rows.extend(np.ones((1, length), np.int64))
        return rows

    rows = begun(5)
    rows.join(begun(3))
    rows.join(begun(4))
    rows.keep([0, 2])
    rows.keep([1])
    shape = f"{tiny.HEADS}, {{}}, {tiny.WIDTH})"
    assert moved == [
        f"resume (2, {shape.format(5)}",
        f"resume (3, {shape.format(5)}",
        "reorder [0, 2]",
        f"resume (1, {shape.format(4)}",
    ]


def test_bad_prompts_are_refused(words) -> None:
    with pytest.raises(InputRefused, match="empty"):
        task(words, "")
    with pytest.raises(InputRefused, match="half a character at position 1"):
        task(words, "a\ud800b")
    with pytest.raises(InputRefused, match="no token 999"):
        generation.task_of_ids(tiny.decoder(), [999], frozenset(), Sampling(), continuing=True)


def test_cancelled_answers_leave_the_others_alone(words) -> None:
    tasks = [task(words, text) for text in PROMPTS]
    answers = [Answer(words, one) for one in tasks]
    batch = Batch(tiny.decoder(chunk=4))
    for answer in answers:
        batch.add(answer)
    answers[3].cancel()
    for _ in range(9):
        batch.iterate()
    answers[1].cancel()
    while len(batch):
        batch.iterate()
    assert [answer.written().reason for answer in answers] == ["length", "cancelled", "length", "cancelled"]
    for i in (0, 2):
        assert list(answers[i].ids) == alone(words, tasks[i])
    assert 0 < len(answers[1].ids) < 20
    assert answers[3].ids == []


def test_numbers_that_are_none_end_one_answer_only(words) -> None:
    broken = tiny.Tiny()
    decoder = tiny.decoder_of(broken)
    good, bad = Answer(words, task(words, PROMPTS[0])), Answer(words, task(words, "\x7f"))
    broken.embedding_VD[127] = np.nan
    run(Batch(decoder), [good, bad])
    with pytest.raises(ValidationFailed, match="NaN"):
        bad.written()
    with pytest.raises(ValidationFailed, match="NaN"):
        good.written()  # its logits have the entry that is NaN
