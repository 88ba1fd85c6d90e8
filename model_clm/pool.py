"""Pieces of a corpus -> processes that sign and tokenise them, in any order; decided on and written in the corpus' own.

A process signs a piece (`clean.sign`), keeps its texts, and tokenises them when it is told what becomes of each: a text
crosses a pipe once. A process has one task at a time, and at most four pieces a process are under way, so memory does
not grow with the corpus.
"""

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import wait

import numpy as np
from tokenizers import Tokenizer

from clean import Filters, remove_lines, sign
from rows import UserError

CUT = 10_000  # characters that are tokenised at once


@dataclass
class Piece:
    """Some neighbouring documents of one source.

    Attributes:
        validation: whether they are those of --validation_path.
        places: their files and lines.
        beginnings: of the texts, to be shown.
        texts: empty once a worker has them.
    """

    source: str
    validation: bool
    places: list[str] = field(default_factory=list)
    beginnings: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    characters: int = 0


@dataclass
class Decision:
    """What becomes of the documents of a piece; see `clean.Judge.decide`."""

    fates: list[str]
    lines: dict[int, set[int]]


@dataclass
class Encoded:
    """The documents of a piece that go to one side: their tokens with an EOS behind each, and what they came from."""

    tokens: np.ndarray
    lengths: np.ndarray
    characters: int
    bytes: int


def load_tokenizer(file: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json, for whole texts in which nothing is a special token."""
    tokenizer = Tokenizer.from_file(file)
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def cut(text: str) -> list[str]:
    """A text in parts of at most CUT characters that end behind a line where there is one."""
    parts, begin = [], 0
    while len(text) - begin > CUT:
        end = text.rfind("\n", begin, begin + CUT) + 1 or begin + CUT
        parts.append(text[begin:end])
        begin = end
    return [*parts, text[begin:]]


def encode(texts: list[str], tokenizer: Tokenizer, eos_token_id: int) -> Encoded:
    """Documents as token ids; what reads like a special token in a text is text.

    Raises:
        UserError: a text has the EOS token in it nevertheless.
    """
    parts = [cut(text) for text in texts]
    encodings = tokenizer.encode_batch_fast([part for own in parts for part in own], add_special_tokens=False)
    encodings.reverse()
    documents = []
    for own in parts:
        ids = np.concatenate([np.array(encodings.pop().ids, np.uint32) for _ in own])
        if (ids == eos_token_id).any():
            raise UserError(
                f"the tokenizer makes its EOS token of a text: {own[0][:80]!r}. Mark that token as special."
            )
        documents += [ids, np.array([eos_token_id], np.uint32)]
    lengths = np.array([len(ids) + 1 for ids in documents[::2]], np.int64)
    return Encoded(np.concatenate(documents), lengths, sum(map(len, texts)), sum(len(text.encode()) for text in texts))


def finish(texts: list[str], cleaned: list[str], decision: Decision, tokenizer: Tokenizer, eos_token_id: int) -> tuple:
    """Tokenises what is kept.

    Returns:
        The `Encoded` documents by side, and the decision's fates, but for a text that was boilerplate as a whole.
    """
    fates, sides = list(decision.fates), {"train": [], "validation": []}
    for number, fate in enumerate(fates):
        if fate == "validation":
            sides[fate].append(texts[number])
        elif fate == "train":
            text = cleaned[number]
            if number in decision.lines:
                text = remove_lines(text, decision.lines[number])
            if text.strip():
                sides[fate].append(text)
            else:
                fates[number] = "boilerplate"
    return {side: encode(kept, tokenizer, eos_token_id) for side, kept in sides.items() if kept}, fates


def work(connection, tokenizer_file: str, eos_token_id: int, filters: Filters) -> None:
    """A process' life: for each message an answer, until there is nobody to send one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which then ends this process
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer, held = load_tokenizer(tokenizer_file), {}
    while True:
        try:
            number, given = connection.recv()
        except EOFError:
            return
        try:
            if isinstance(given, Piece):
                cleaned, answer = sign(given.texts, filters)
                held[number] = given.texts, cleaned
            else:
                answer = finish(*held.pop(number), given, tokenizer, eos_token_id)
        except UserError as error:
            answer = error
        except Exception:
            answer = UserError(f"a worker failed:\n{traceback.format_exc()}")
        connection.send(answer)


class Workers:
    """Processes with a pipe each.

    Raises:
        UserError: one ended, with what it was busy with (in `send` and `receive`), or what one of them raised.
    """

    def __init__(self, count: int, *settings):
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of whoever calls
        self.processes, self.connections, self.busy = [], [], {}
        for _ in range(count):
            connection, theirs = context.Pipe()
            process = context.Process(target=work, args=(theirs, *settings), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.connections.append(connection)

    def idle(self) -> list[int]:
        return [worker for worker in range(len(self.processes)) if worker not in self.busy]

    def send(self, worker: int, number: int, given: Piece | Decision, name: str) -> None:
        """Gives a task to an idle worker; `name` is what the user knows it by."""
        self.busy[worker] = number, name
        try:
            self.connections[worker].send((number, given))
        except OSError:
            raise self.died(worker) from None

    def receive(self) -> Iterator[tuple[int, int, object]]:
        """Waits, then yields (worker, number of the piece, answer) of those that are ready."""
        by_connection = {self.connections[worker]: worker for worker in self.busy}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                raise self.died(worker) from None
            number, name = self.busy.pop(worker)
            if isinstance(answer, UserError):
                raise UserError(f"{name}: {answer}")
            yield worker, number, answer

    def died(self, worker: int) -> UserError:
        process = self.processes[worker]
        process.join(10)
        code = process.exitcode
        how = f"by signal {-code} (9 is mostly for lack of memory)" if code and code < 0 else f"with code {code}"
        return UserError(
            f"a worker (process {process.pid}) ended {how} at {self.busy[worker][1]}. Nothing was written."
        )

    def stop(self) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            process.kill()
            process.join()
            connection.close()


def run(workers: Workers, pieces: Iterator[Piece], decide: Callable, write: Callable) -> None:
    """Takes all pieces through the workers.

    Args:
        decide: called with each piece and its `Signed` in the pieces' order; returns a `Decision`.
        write: called with each piece and what `finish` returns, in the same order.
    """
    under_way, signed, finished = {}, {}, {}  # by number: the piece, what a worker signed, what it finished
    waiting = [deque() for _ in workers.processes]  # the decided pieces that a worker holds
    started = decided = written = 0
    exhausted = False
    while True:
        for worker in workers.idle():
            if waiting[worker]:
                number, decision = waiting[worker].popleft()
                workers.send(worker, number, decision, under_way[number].places[0])
            elif not exhausted and started - written < 4 * len(waiting):
                piece = next(pieces, None)
                if piece is None:
                    exhausted = True
                    continue
                workers.send(worker, started, piece, piece.places[0])
                piece.texts = []  # the worker has them
                under_way[started] = piece
                started += 1
        if not workers.busy:
            return
        for worker, number, answer in workers.receive():
            if number >= decided:
                signed[number] = worker, answer
            else:
                finished[number] = answer
        while decided in signed:
            worker, answer = signed.pop(decided)
            waiting[worker].append((decided, decide(under_way[decided], answer)))
            decided += 1
        while written in finished:
            write(under_way.pop(written), *finished.pop(written))
            written += 1
