"""The writing thread: answers as they are alone, a queue with an end, clients who leave, a model that breaks."""

from __future__ import annotations

import queue
import threading
import time

import pytest

from dinoexport.errors import BuildError, DinoexportError
from dinoexport.text import tokenizer
from dinoexport.text.generation import Written
from dinoexport.text.sampling import Sampling
from dinoexport.text.service import QueueFull, Service
from tests.text import tiny
from tests.text.test_generation import PROMPTS, alone, task


class Reader:
    """Keeps what it is told. patience: texts after which it leaves."""

    def __init__(self, patience: int = 10**9) -> None:
        self.patience, self.texts = patience, []
        self.end: queue.Queue = queue.Queue()

    def text(self, text: str) -> None:
        self.texts.append(text)

    def done(self, written: Written) -> None:
        self.end.put(written)

    def failed(self, error: DinoexportError) -> None:
        self.end.put(error)

    def gone(self) -> bool:
        return len(self.texts) >= self.patience


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> tokenizer.Tokenizer:
    return tokenizer.load(tiny.tokenizer_json(tmp_path_factory.mktemp("tiny")))


class Slow(tiny.Tiny):
    """Waits in every call until it may go on. broken: the call that raises."""

    def __init__(self) -> None:
        super().__init__()
        self.may, self.broken = threading.Semaphore(0), -1

    def __call__(self, arrays):
        assert self.may.acquire(timeout=20)
        if len(self.calls) == self.broken:
            self.broken = -1
            raise RuntimeError("/secret/path")
        return super().__call__(arrays)


def slow_service(words, **options):
    run = Slow()
    decoder = tiny.decoder_of(run)
    return Service(words, decoder, **options), run


def test_many_clients_get_their_own_answers(words) -> None:
    service = Service(words, tiny.decoder())
    tasks = [task(words, PROMPTS[i % 4] + str(i), Sampling(max_tokens=4 + i % 7)) for i in range(20)]
    readers = [Reader() for _ in tasks]
    for one, reader in zip(tasks, readers, strict=True):
        service.submit(one, reader)
    written = [reader.end.get(timeout=20) for reader in readers]
    assert [list(each.ids) for each in written] == [alone(words, one) for one in tasks]
    assert ["".join(reader.texts) for reader in readers] == [each.text for each in written]
    assert all(text for reader in readers for text in reader.texts), "a part of a character is no text"
    service.close()


def test_the_writing_thread_keeps_no_process_alive(words) -> None:
    service = Service(words, tiny.decoder())
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "dinoexport-text")
    assert thread.daemon
    service.close()
    assert not thread.is_alive()


def test_who_waits_while_the_model_breaks_gets_an_answer(words) -> None:
    service, run = slow_service(words, slots=1)
    run.broken = 1
    first, waiting = Reader(), Reader()
    service.submit(task(words, PROMPTS[0]), first)
    service.submit(task(words, PROMPTS[1], Sampling(max_tokens=3)), waiting)
    run.may.release(1000)
    assert isinstance(first.end.get(timeout=20), BuildError)
    assert list(waiting.end.get(timeout=5).ids) == alone(words, task(words, PROMPTS[1], Sampling(max_tokens=3)))
    service.close()


def test_the_queue_ends_with_a_refusal_in_words(words) -> None:
    service, run = slow_service(words, slots=2, queue=3)
    readers = [Reader() for _ in range(5)]
    for reader in readers:
        service.submit(task(words, "x", Sampling(max_tokens=2)), reader)
    with pytest.raises(QueueFull, match="requests wait, as many as may"):
        service.submit(task(words, "x"), Reader())
    run.may.release(100)
    for reader in readers:
        assert reader.end.get(timeout=20).reason == "length"
    service.submit(task(words, "x"), readers[0])
    assert readers[0].end.get(timeout=20).reason == "length"
    service.close()


def test_who_leaves_is_not_written_for(words) -> None:
    service, run = slow_service(words, slots=1, queue=3)
    leaving, waiting, staying = Reader(patience=2), Reader(patience=0), Reader()
    service.submit(task(words, PROMPTS[0], Sampling(max_tokens=50)), leaving)
    service.submit(task(words, PROMPTS[0], Sampling(max_tokens=50)), waiting)
    service.submit(task(words, PROMPTS[1], Sampling(max_tokens=5)), staying)
    run.may.release(8)
    assert leaving.end.get(timeout=20).reason == "cancelled"
    assert waiting.end.get(timeout=20).reason == "cancelled"
    assert waiting.texts == []
    assert list(staying.end.get(timeout=20).ids) == alone(words, task(words, PROMPTS[1], Sampling(max_tokens=5)))
    assert service.load == (0, 0)
    service.close()


def test_a_model_that_breaks_fails_its_answers_and_goes_on(words) -> None:
    told = []
    service, run = slow_service(words, slots=2, broken=lambda: told.append(1))
    run.broken = 3
    run.may.release(1000)
    first, second = Reader(), Reader()
    service.submit(task(words, PROMPTS[0]), first)
    error = first.end.get(timeout=20)
    assert isinstance(error, BuildError)
    assert "secret" not in error.message
    assert told == [1]
    service.submit(task(words, PROMPTS[0]), second)
    assert list(second.end.get(timeout=20).ids) == alone(words, task(words, PROMPTS[0]))
    service.close()


def test_closing_fails_what_is_left(words) -> None:
    service, run = slow_service(words, slots=1)
    readers = [Reader() for _ in range(3)]
    for reader in readers:
        service.submit(task(words, "x"), reader)
    time.sleep(0.05)
    closing = threading.Thread(target=service.close)
    closing.start()
    run.may.release(100)
    closing.join(20)
    for reader in readers:
        end = reader.end.get(timeout=20)
        assert isinstance(end, QueueFull) or end.reason == "length"
    with pytest.raises(QueueFull, match="unloaded"):
        service.submit(task(words, "x"), Reader())


def test_sixteen_requests_wait_unless_told_otherwise(words) -> None:
    service, run = slow_service(words, slots=1)
    readers = [Reader() for _ in range(17)]
    for reader in readers:
        service.submit(task(words, "x", Sampling(max_tokens=1)), reader)
    with pytest.raises(QueueFull, match="16 requests wait, as many as may"):
        service.submit(task(words, "x"), Reader())
    run.may.release(1000)
    for reader in readers:
        reader.end.get(timeout=20)
    service.close()


def test_closing_waits_ten_seconds(words, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no longer, as a call of the model may."""
    service = Service(words, tiny.decoder())
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "dinoexport-text")
    waited, join = [], thread.join
    monkeypatch.setattr(thread, "join", lambda timeout=None: waited.append(timeout) or join(timeout))
    service.close()
    service.close(timeout_s=0.5)
    assert waited == [10.0, 0.5]
