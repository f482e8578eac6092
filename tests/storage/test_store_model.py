"""A stream against a model of a few dictionaries: whatever comes in whatever order, with crashes in between.

Frames and parts in any order, twice, with other content, late; gaps declared; chunks sealed in a
second thread; a crash that keeps of one journal only its first bytes. No stored frame is lost or
changed, each index is in exactly the state the rules give, and the ledger balances.
"""

import contextlib
import os
import shutil
import tempfile
import threading
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from storage.errors import FrameTooLate, IndexConflict
from storage.frame import FrameInfo
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.stream_source import FolderSource
from storage.stream_store import Admission, StreamStore

from .stores import new_store, row

SIZE, MOST = 3, 11
indices, contents = st.integers(0, MOST - 1), st.integers(0, 1)
Slot = tuple[int, int]


def frame(slot: Slot, content: int, producer: str, sequence: int) -> tuple[FrameInfo, bytes]:
    blob = bytes([slot[0], slot[1], content, 0])
    return row(slot[0], blob, part=slot[1], producer=producer, sequence=sequence), blob


class StreamModel(RuleBasedStateMachine):
    """The store beside what it should be."""

    @initialize(parts=st.integers(1, 2))
    def begin(self, parts: int) -> None:
        self.root, self.parts = Path(tempfile.mkdtemp()), parts
        self.store = new_store(self.root, shape=(4,), dtype="uint8", codec="raw", frames_per_chunk=SIZE, parts=parts)
        self.outside = FolderSource(self.store.folder, "eiger")
        self.in_time: dict[Slot, tuple[int, str, int]] = {}  # content, producer, sequence
        self.late: dict[Slot, tuple[int, str, int]] = {}
        self.causes: dict[int, tuple[FrameState, str]] = {}
        self.taken: list[int] = []
        self.announced = self.n_sent = 0

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        with contextlib.suppress(FrameTooLate):
            for chunk in self.store.begin_finish(self.announced, "end"):
                self.in_another_thread(lambda chunk=chunk: self.store.seal(chunk))
            self.give_up(0, self.announced, FrameState.missing, "end")
            self.in_another_thread(self.store.end_finish)
            self.check()
            assert self.store.ledger() == self.outside.ledger() == FolderSource(self.store.folder, "eiger").ledger()
            assert not list(self.store.paths.journal.iterdir())
            self.store.close()
        shutil.rmtree(self.root)

    # ---- what happens -----------------------------------------------------------------------------

    @rule(index=indices, part=contents, content=contents, producer=st.sampled_from("ab"))
    def send(self, index: int, part: int, content: int, producer: str) -> None:
        slot = (index, min(part, self.parts - 1))
        known = self.in_time.get(slot) or self.late.get(slot)
        info, blob = frame(slot, content, producer, self.n_sent)
        if known is not None and known[0] != content:
            with contextlib.suppress(IndexConflict):
                raise AssertionError(f"{self.store.admit(info)} for other content")
            return
        admission = self.store.admit(info)
        if known is not None:
            assert admission is Admission.duplicate
        elif index // SIZE in self.taken:
            assert admission is Admission.late
            self.store.append_late(info, blob)
            self.late[slot] = (content, producer, self.n_sent)
        else:
            assert admission is Admission.new
            self.store.append(info, blob)
            self.in_time[slot] = (content, producer, self.n_sent)
        self.announced = max(self.announced, index + 1)
        self.n_sent += 1

    @rule(order=st.lists(indices, min_size=1, max_size=6, unique=True), content=contents)
    def send_many(self, order: list[int], content: int) -> None:
        slots = [(i, part) for i in order for part in range(self.parts)]
        new = [s for s in slots if s not in self.in_time and s not in self.late and s[0] // SIZE not in self.taken]
        self.store.append_many([frame(slot, content, "c", self.n_sent + n) for n, slot in enumerate(new)])
        for slot in new:
            self.in_time[slot] = (content, "c", self.n_sent)
            self.n_sent += 1
            self.announced = max(self.announced, slot[0] + 1)

    @precondition(lambda self: self.in_time or self.late)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        known = self.in_time | self.late
        slot = data.draw(st.sampled_from(sorted(known)))
        assert self.store.admit(frame(slot, *known[slot])[0]) is Admission.retry
        assert self.store.answered(*known[slot][1:]) == slot[0]

    @rule(start=indices, n=st.integers(1, 6), state=st.sampled_from([FrameState.missing, FrameState.rejected]))
    def account(self, start: int, n: int, state: FrameState) -> None:
        stop = min(start + n, MOST)
        self.announced = max(self.announced, stop)
        self.store.account(start, stop, state, f"cause {self.n_sent % 3}")
        self.give_up(start, stop, state, f"cause {self.n_sent % 3}")
        self.n_sent += 1

    def give_up(self, start: int, stop: int, state: FrameState, cause: str) -> None:
        for index in range(start, stop):
            if self.expected(index) is FrameState.pending:
                has_parts = any((index, part) in self.in_time | self.late for part in range(self.parts))
                # Given up as incomplete; should power take its parts as well, it is missing.
                self.causes[index] = (FrameState.missing if has_parts else state, cause)

    @rule()
    def take(self) -> None:
        complete = [k for k in range(self.announced // SIZE) if k not in self.taken and self.is_complete(k)]
        assert self.store.take_complete() == complete
        self.taken += complete

    @precondition(lambda self: any(chunk not in self.store.sealed for chunk in self.taken))
    @rule()
    def seal(self) -> None:
        chunk = next(chunk for chunk in self.taken if chunk not in self.store.sealed)
        self.in_another_thread(lambda: self.store.seal(chunk))

    @rule(data=st.data(), is_power_lost=st.booleans())
    def crash(self, data: st.DataObject, is_power_lost: bool) -> None:
        journals = [*self.store._journals.values(), *self.store._amendments._segments.values()]
        if is_power_lost and journals:
            journal = data.draw(st.sampled_from(journals), label="journal")
            cut = data.draw(st.integers(0, journal.end), label="bytes that are left")
            self.lose(journal, cut)
        self.store.close()
        if is_power_lost and journals:
            os.truncate(journal.path, cut)
        self.store = StreamStore.recover(RunFolder.open(self.store.folder.path), "eiger")
        # A reader from outside has seen what is lost now: a new one is asked from here on.
        self.outside = FolderSource(self.store.folder, "eiger")
        ends = [slot[0] + 1 for slot in self.in_time | self.late] + [index + 1 for index in self.causes]
        ends += [commit.stop for commit in self.store.sealed.values()]
        self.announced = max(ends, default=0)
        self.taken = [k for k in range(self.announced // SIZE) if self.is_complete(k)]
        assert sorted(self.store.sealed) == self.taken

    def lose(self, journal, cut: int) -> None:
        frames = self.in_time if journal in self.store._journals.values() else self.late
        for slot, info in journal.infos.items():
            place = journal.locations[slot]
            if place.offset + place.length + 4 > cut:
                del frames[info.frame_index, info.part]

    # ---- what should be -----------------------------------------------------------------------------

    def expected(self, index: int) -> FrameState:
        in_time = sum((index, part) in self.in_time for part in range(self.parts))
        late = sum((index, part) in self.late for part in range(self.parts))
        if in_time == self.parts:
            return FrameState.stored
        if in_time + late == self.parts:
            return FrameState.late
        if in_time + late:
            return FrameState.incomplete if late or index in self.causes else FrameState.pending
        return self.causes[index][0] if index in self.causes else FrameState.pending

    def is_complete(self, chunk: int) -> bool:
        is_whole = (chunk + 1) * SIZE <= self.announced
        return is_whole and all(
            self.expected(i) is not FrameState.pending for i in range(chunk * SIZE, (chunk + 1) * SIZE)
        )

    def in_another_thread(self, work) -> None:
        failed: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    @invariant()
    def check(self) -> None:
        if not hasattr(self, "store"):
            return
        wanted = [self.expected(index) for index in range(self.announced)]
        assert [self.store.states[index] for index in range(self.store.states.announced)] == wanted
        self.check_frames(self.store)
        assert self.store.ledger().problems == []
        self.outside.status()
        if set(self.taken) <= set(self.store.sealed):
            assert [self.outside.states[index] for index in range(self.announced)] == wanted
            self.check_frames(self.outside)
        assert self.outside.ledger().problems == []

    def check_frames(self, source: StreamStore | FolderSource) -> None:
        known = self.in_time | self.late
        readable = {slot for slot in known if self.expected(slot[0]) is not FrameState.pending}
        assert [(info.frame_index, info.part) for info in source.infos(0, MOST)] == sorted(readable)
        for index in {slot[0] for slot in readable}:
            for found in source.read_parts(index):
                slot = (index, found.info.part)
                assert bytes(found.blob) == frame(slot, *known[slot])[1]
                assert found.info.late is (slot in self.late)
        for index in range(self.announced):
            if self.expected(index) in (FrameState.missing, FrameState.rejected):
                assert source.states.cause(index) == self.causes[index][1]


StreamModel.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestStreamModel = StreamModel.TestCase
