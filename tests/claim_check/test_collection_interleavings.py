"""The interleavings of writers, readers and collections that could delete a payload in use, one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from djp_dagster.claim_check import collection
from djp_dagster.claim_check.condemned import Sentence
from tests.claim_check.interleaving import World
from tests.claim_check.kit import keys

HALF = World.grace_s / 2 + 121
A, B = b"content A", b"content B"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path / "payloads", monkeypatch)


def sentence_of(world: World, key: str) -> Sentence:
    return world.listed()[key]


class TestPhases:
    """Condemned, confirmed, deleted."""

    def test_one_after_the_other(self, world: World) -> None:
        key = world.key_of(world.put(A))
        world.wait(world.grace_s - 1)
        assert world.collect().young == 1
        world.wait(2)
        assert world.collect().count("condemned") == (1, len(A))
        condemned_at = world.clock.now_s
        assert sentence_of(world, key) == Sentence(condemned_at)
        world.wait(HALF - 2)
        assert world.collect().count("waiting") == (1, len(A))
        assert sentence_of(world, key) == Sentence(condemned_at)
        world.wait(2)
        assert world.collect().count("waiting") == (1, len(A))
        assert sentence_of(world, key) == Sentence(world.clock.now_s, confirmed=True)
        world.wait(world.grace_s / 2 - 1)
        assert world.collect().count("waiting") == (1, len(A))
        world.wait(1)
        report = world.collect()
        assert (report.count("deleted"), [found.key for found in report.garbage]) == ((1, len(A)), [key])
        assert world.objects.inner.info(key) is None
        assert world.listed() == {}

    @pytest.mark.parametrize("collections", [1, 2])
    def test_what_is_named_again_comes_off(self, world: World, collections: int) -> None:
        key = world.garbage(A, collections=collections)
        assert world.key_of(world.put(A)) == key
        assert world.listed() == {}
        world.collect()
        assert sentence_of(world, key).confirmed is False

    def test_readers_who_make_it_visible_again(self, world: World) -> None:
        claim = world.put(A)
        for _ in range(2):
            world.wait(world.grace_s + 121)
            world.collect()
        world.visible.append(claim)
        report = world.collect()
        assert (report.in_use, report.pardoned) == (1, 1)
        assert world.listed() == {}

    def test_what_is_gone_comes_off(self, world: World) -> None:
        key = world.garbage(A, collections=1)
        world.objects.delete([key])
        world.collect()
        assert world.listed() == {}

    def test_a_clock_that_was_wrong(self, world: World) -> None:
        """Its dates lie in the future: they do not keep the garbage until then."""
        world.put(A)
        world.wait(world.grace_s + 1)
        world.clock.now_s += 10 * 365 * 86400
        world.collect()
        world.clock.now_s -= 10 * 365 * 86400
        for _ in range(4):
            world.wait(world.grace_s + 121)
            world.collect()
        assert world.listed() == {}
        assert keys(world.objects.inner) == ["rooms/memory"]


class TestWriters:
    """What a writer relies on stays."""

    def test_it_finds_the_object_being_deleted(self, world: World) -> None:
        key = world.garbage(A, collections=2)
        collector = world.collecting().until("delete")
        world.visible.append(world.put(A))
        assert world.key_of(world.visible[0]).startswith(f"{key}.")
        collector.finish()
        assert world.is_there(world.visible[0])
        assert world.objects.inner.info(key) is None

    def test_it_saves_before_the_collection_marks(self, world: World) -> None:
        """The collection has decided, and finds at the last moment that the list has changed."""
        world.garbage(A, collections=2)
        collector = world.collecting().until("write")
        claim = world.put(A)
        report = collector.finish()
        assert report.count("deleted") == (0, 0)
        world.visible.append(claim)
        assert world.is_there(claim)

    def test_it_saves_what_is_marked_just_then(self, world: World) -> None:
        world.garbage(A, collections=2)
        writer = world.putting(A).until("write")
        collector = world.collecting().until("delete")
        claim = writer.finish()
        collector.finish()
        assert world.is_there(claim)

    def test_the_object_goes_while_the_writer_looks(self, world: World) -> None:
        """It finds the object and, only after it was deleted and taken off, the list without it."""
        world.garbage(A, collections=2)
        writer = world.putting(A).until("put")
        writer.step()
        world.collect()
        assert world.is_there(writer.finish())

    def test_two_writers_find_that_the_object_has_gone(self, world: World) -> None:
        world.garbage(A, collections=2)
        writers = [world.putting(A).until("put") for _ in range(2)]
        for writer in writers:
            writer.step()
        world.collect()
        for writer in writers:
            writer.until("put")
        claims = {writer.finish().uri for writer in writers}
        assert len(claims) == 1
        assert world.is_there(world.put(A))

    def test_an_object_whose_making_is_answered_at_the_second_time(self, world: World) -> None:
        for content in (A, B):
            writer = world.putting(content).until("put")
            writer.step(loses=True)
            assert world.is_there(writer.finish())

    def test_a_request_for_deletion_that_is_sent_twice(self, world: World) -> None:
        """Its first answer is lost. In between a writer makes the object anew."""
        world.garbage(A, collections=2)
        collector = world.collecting().until("delete")
        collector.step(loses=True)
        assert collector.at == "delete again"
        claim = world.put(A)
        collector.finish()
        assert world.is_there(claim)

    def test_sent_twice_and_taken_off_before_the_writer_looks(self, world: World) -> None:
        world.garbage(A, collections=2)
        collector = world.collecting().until("delete")
        collector.step(loses=True)
        writer = world.putting(A).until("put")
        writer.step()
        collector.finish()
        assert world.is_there(writer.finish())

    def test_it_condemns_slowly(self, world: World) -> None:
        """The writer reads the list before the condemnation arrives there, long after it was sent."""
        world.put(A)
        world.wait(world.grace_s + 1)
        collector = world.collecting().until("write")
        world.wait(world.grace_s)
        writer = world.process()
        claim = world.put(A, writer)
        collector.finish()
        for seconds in (1, world.grace_s / 2 + 1):
            world.wait(seconds)
            world.collect()
        world.visible.append(claim)  # within the grace period
        assert world.is_there(claim)

    def test_it_goes_by_an_old_list_for_as_long_as_it_may(self, world: World) -> None:
        world.put(A)
        world.wait(world.grace_s + 1)
        writer = world.process()
        world.put(B, writer)  # it knows the list from now on
        world.collect()
        world.wait(59)
        claim = world.put(A, writer)
        world.wait(world.grace_s / 2 - 58)
        world.collect()
        world.wait(world.grace_s / 2 + 1)
        world.collect()
        world.wait(56)
        world.visible.append(claim)
        assert world.is_there(claim)
        world.wait(world.grace_s)
        assert world.collect().in_use == 1

    def test_it_knows_nothing_after_the_machine_has_slept(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        """One of the clocks of a sleeping machine stands still."""
        writer = world.process()
        world.put(B, writer)
        asleep_at = world.clock.now_s
        monkeypatch.setattr(world.clock, "monotonic", lambda: asleep_at)
        key = world.garbage(A, collections=2)
        claim = world.put(A, writer)
        world.collect()
        assert world.key_of(claim) == key
        assert world.is_there(claim)

    def test_it_is_condemned_anew_before_the_collection_marks(self, world: World) -> None:
        """It was due when the collection began; a writer has taken it off, and another collection put it on again."""
        world.garbage(A, collections=2)
        collector = world.collecting().until("write")
        claim = world.put(A)
        world.collect()
        assert list(world.listed()) == [world.key_of(claim)]
        collector.finish()
        world.visible.append(claim)
        assert world.is_there(claim)

    def test_visible_after_the_rooms_were_asked(self, world: World) -> None:
        """The grace period ends while the collection is under way, which has begun before."""
        writer = world.process()
        world.put(A)
        world.wait(world.grace_s + 1)
        world.put(B, writer)
        world.collect()
        world.wait(10)
        claim = world.put(A, writer)
        world.wait(HALF - 10)
        world.collect()
        world.wait(world.grace_s / 2 - 150)
        collector = world.collecting().until("ask")
        collector.step()
        world.wait(20)
        world.visible.append(claim)
        world.wait(200)
        collector.finish()
        assert world.is_there(claim)

    def test_writers_who_take_nothing_off_in_vain(self, world: World) -> None:
        """Whose answer is lost, when it was taken off already."""
        world.garbage(A, collections=2)
        writer = world.putting(A).until("write")
        writer.step(loses=True)
        claim = writer.finish()
        assert world.listed() == {}
        assert world.is_there(claim)


class TestReaders:
    """Half a grace period remains to whoever has read a claim."""

    def test_visible_between_two_collections_only(self, world: World) -> None:
        """A writer that did not know yet makes it visible; it is withdrawn before any collection could see it."""
        world.put(A)
        world.wait(world.grace_s + 1)
        writer = world.process()
        world.put(B, writer)
        world.collect()
        world.wait(50)
        claim = world.put(A, writer)
        world.visible.append(claim)
        world.wait(10 * world.grace_s)
        world.visible.clear()
        world.collect()
        assert world.is_there(claim)
        world.wait(world.grace_s / 2 - 1)
        world.collect()
        assert world.is_there(claim)
        world.wait(2)
        world.collect()
        assert not world.is_there(claim)


class TestCollections:
    """Several at once, and those that die or stand still."""

    def test_two_find_the_same(self, world: World) -> None:
        world.garbage(A, collections=2)
        first, second = world.collecting().until("write"), world.collecting().until("write")
        first.until("delete")
        second.finish()
        claim = world.put(A)
        first.finish()
        assert world.is_there(claim)
        assert world.listed() == {}

    def test_the_second_decides_after_the_first_is_done(self, world: World) -> None:
        world.garbage(A, collections=2)
        first, second = world.collecting().until("write"), world.collecting().until("write")
        first.finish()
        claim = world.put(A)
        second.finish()
        assert world.is_there(claim)

    @pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
    def test_one_that_dies_while_it_deletes(self, world: World, after: bool) -> None:
        key = world.garbage(A, collections=2)
        world.collecting().until("delete").kill(after=after)
        assert sentence_of(world, key).deleting
        world.collect()
        assert sentence_of(world, key).deleting
        copy = world.put(A)
        assert world.key_of(copy) != key
        world.wait(world.grace_s - 1)
        world.collect()
        world.visible.append(copy)
        assert world.is_there(copy)
        world.visible.clear()
        for _ in range(4):
            world.wait(world.grace_s)
            world.collect()
        assert keys(world.objects.inner) == ["rooms/memory"]
        assert world.listed() == {}

    def test_one_that_takes_off_what_another_deletes_by_now(self, world: World) -> None:
        """It stood still between deleting and taking off, for days."""
        key = world.garbage(A, collections=2)
        slow = world.collecting().until("delete")
        slow.step()
        slow.until("write")
        world.wait(collection._TAKE_OVER_S)
        world.collect()
        assert world.listed() == {}
        assert world.garbage(A, collections=2) == key
        other = world.collecting().until("delete")
        slow.finish()
        claim = world.put(A)
        other.finish()
        assert world.is_there(claim)

    def test_one_that_deletes_slowly_marks_anew(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collection, "_DELETED_AT_ONCE", 1)
        for content in (A, B):
            world.put(content)
        for _ in range(2):
            world.wait(world.grace_s + 121)
            world.collect()
        world.wait(world.grace_s)
        collector = world.collecting().until("delete")
        assert {found.since for found in world.listed().values()} == {world.clock.now_s}
        world.wait(300)
        collector.step()
        collector.until("delete")
        assert [found.since for found in world.listed().values()] == [world.clock.now_s]
        collector.finish()
        assert world.listed() == {}

    def test_one_that_stood_still_deletes_no_more(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collection, "_DELETED_AT_ONCE", 1)
        for content in (A, B):
            world.put(content)
        for _ in range(2):
            world.wait(world.grace_s + 121)
            world.collect()
        world.wait(world.grace_s)
        slow = world.collecting().until("delete")
        world.wait(collection._TAKE_OVER_S)
        world.collect()
        slow.step()
        claims = [world.put(content) for content in (A, B)]
        slow.finish()
        assert all(map(world.is_there, claims))

    def test_a_list_whose_answer_is_lost(self, world: World) -> None:
        """What it has marked, and does not know it, it finds marked by itself."""
        for collections in (0, 1, 2):
            key = world.garbage(b"%d" % collections, collections=collections)
            collector = world.collecting().until("write")
            collector.step(loses=True)
            collector.finish()
            if collections == 2:
                assert world.objects.inner.info(key) is None
                assert key not in world.listed()

    def test_the_list_holds_so_many(self, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collection, "_MOST_ON_LIST", 5)
        monkeypatch.setattr(collection, "_MARKED_AT_ONCE", 2)
        monkeypatch.setattr(collection, "_LOOKED_AT_ONCE", 4)
        for number in range(17):
            world.put(b"%d" % number)
        counts = []
        for _ in range(20):
            world.wait(world.grace_s + 121)
            report = world.collect()
            assert len(world.listed()) <= 5
            counts.append(report.count("later")[0])
            assert report.count("condemned", "waiting", "deleted", "later")[0] == report.payloads
        assert counts[:3] == [12, 12, 7]
        assert report.payloads == 0
