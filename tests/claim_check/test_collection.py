"""Collection of garbage: what it asks, what it keeps, what it refuses, what it leaves alone."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

import djp_dagster as djp
from djp_dagster import Claim, EventStream, PayloadStore, Topic, open_payload_store, open_stream
from djp_dagster.claim_check import collection
from djp_dagster.claim_check.collection import CollectionReport, collect
from djp_dagster.claim_check.condemned import Condemned
from djp_dagster.claim_check.keys import content_key
from djp_dagster.claim_check.local import LocalObjects
from djp_dagster.claim_check.objects import DocumentChanged
from djp_dagster.claim_check.references import goes_at, keys_in
from djp_dagster.errors import (
    CollectionRefusedError,
    InvalidSettingError,
    PayloadMissingError,
    PayloadStoreUnavailableError,
    StreamUnavailableError,
)
from djp_dagster.testing import Clock
from tests.claim_check.aging import DAY, Passing, tree
from tests.claim_check.kit import MIB, Place, at_once, content, keys
from tests.processing.kit import FAST
from tests.servers.faulty_s3 import FaultyS3
from tests.servers.s3_faults import LoseResponse, Refuse, StripHeaders

HEAVY = Topic("heavy", offload_above=50, retention="1h")
LIGHT = Topic("light", retention="1h")
TEXT = "a text that is long enough to be offloaded, which takes fifty bytes"


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Passing:
    return Passing(monkeypatch)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream(place: Place, tmp_path: Path, clock: Clock) -> Iterator[EventStream]:
    with open_stream(tmp_path / "stream.db", payloads=place.open(), clock=clock) as stream:
        for topic in (HEAVY, LIGHT):
            stream.create_topic(topic)
        yield stream


class ListedRoom:
    """References that a test has written down."""

    def __init__(self, name: str = "list", *held: bytes) -> None:
        self.name, self.held = name, held

    def references(self) -> Iterator[bytes]:
        yield from self.held


def collected(stream: EventStream, later: Passing, *, times: int = 4) -> CollectionReport:
    """What the last of some daily collections says."""
    for _ in range(times):
        later(stream.payloads)
        report = stream.collect_payloads(dry_run=False)
    return report


def trimmed(stream: EventStream, clock: Clock) -> None:
    """Retention takes every record that may go."""
    clock.advance(7200)
    stream.apply_retention()


def payloads_of(stream: EventStream) -> list[str]:
    return [key for key in keys(stream.payloads) if not key.startswith("rooms/")]


class TestMarks:
    """What refers to a payload, wherever it stands, keeps it; when it is gone, the payload goes."""

    def test_records_until_retention(self, stream: EventStream, clock: Clock, later: Passing) -> None:
        stream.publish(HEAVY, [HEAVY.event(text=TEXT, n=n) for n in range(3)])
        report = collected(stream, later)
        assert (report.in_use, report.counts, report.payloads) == (3, {}, 3)
        assert [record.data["n"] for record in stream.records(HEAVY, 0)] == [0, 1, 2]
        trimmed(stream, clock)
        assert payloads_of(stream) != []
        collected(stream, later)
        assert payloads_of(stream) == []
        assert Condemned(stream.payloads.objects).read() == {}

    def test_one_payload_of_several_records(self, stream: EventStream, clock: Clock, later: Passing) -> None:
        event = HEAVY.event(text=TEXT)
        stream.publish(HEAVY, [event])
        trimmed(stream, clock)
        stream.publish(HEAVY, [event.replace(id="another")])
        assert collected(stream, later).in_use == 1
        assert next(stream.records(HEAVY, 0)).data == {"text": TEXT}

    @pytest.mark.parametrize(
        "holding",
        [
            lambda claim: {"data": {"deep": [{"claim": claim.to_dict()}]}},
            lambda claim: {"data": claim.to_json()},
            lambda claim: {"data": json.dumps({"text": claim.to_json().decode()})},
            lambda claim: {"data": {"escaped": claim.uri.replace("/", r"\/")}},
            lambda claim: {"data": {"escaped twice": json.dumps(claim.uri.replace("/", r"\/"))}},
            lambda claim: {"data": {claim.uri: 1}},
            lambda claim: {"data": [claim.uri, 46, *b"abcdefabcdef"]},
            lambda claim: {"data": f"see {claim.uri}.zst."},
            lambda claim: {"subject": claim.uri},
            lambda claim: {"ext": {"other": claim.uri}},
            lambda claim: {"data": {"claim": claim.to_dict(), "text": TEXT}},
        ],
        ids=["dict", "bytes", "text", "escaped", "twice", "key", "array", "words", "subject", "ext", "offloaded"],
    )
    def test_claims_that_somebody_put_somewhere(
        self, stream: EventStream, clock: Clock, later: Passing, holding: Callable[[Claim], dict[str, Any]]
    ) -> None:
        claim = stream.payloads.put(b"named by somebody").claim
        gone = stream.payloads.put(b"named by nobody").claim
        data = holding(claim).get("data")
        topic = HEAVY if isinstance(data, dict) and "text" in data else LIGHT
        stream.publish(topic, [topic.event().replace(**holding(claim))])
        collected(stream, later)
        assert stream.payloads.read(claim) == b"named by somebody"
        with pytest.raises(PayloadMissingError):
            stream.payloads.read(gone)
        trimmed(stream, clock)
        collected(stream, later)
        assert payloads_of(stream) == []

    def test_dead_letters_after_their_records(self, stream: EventStream, clock: Clock, later: Passing) -> None:
        @djp.consumer(topic=HEAVY, group="picky", isolate="per_event", retry=FAST)
        def picky(record: djp.Record) -> None:
            if record.data["n"] == 1:
                raise ValueError

        picky.register(stream)
        stream.publish(HEAVY, [HEAVY.event(text=TEXT, n=n) for n in range(3)])
        djp.run_pending(stream, picky)
        trimmed(stream, clock)
        assert collected(stream, later).in_use == 1
        assert len(payloads_of(stream)) == 1
        djp.redrive(stream, picky)
        stream.delete_group("picky")
        collected(stream, later)
        assert payloads_of(stream) == []

    def test_outputs_and_what_failed_attempts_left(self, stream: EventStream, later: Passing) -> None:
        @djp.consumer(topic=LIGHT, group="summing")
        def summing(batch: djp.Batch) -> bytes:
            return b"%d" % len(batch)

        summing.register(stream)
        for n in range(2):
            stream.publish(LIGHT, [LIGHT.event(n=n)])
            djp.run_pending(stream, summing)
        left = stream.payloads.create("attempts/summing/some-batch/1/output", "text/plain").finish()
        assert collected(stream, later).in_use == 2
        found = payloads_of(stream)
        assert (len(found), left.key in found) == (2, False)
        assert [output.load() for output in djp.BatchOutputs(stream, "summing")] == [b"1", b"1"]
        stream.delete_group("summing")
        collected(stream, later)
        assert payloads_of(stream) == []

    def test_state(self, stream: EventStream, clock: Clock, later: Passing, tmp_path: Path) -> None:
        @djp.consumer(topic=LIGHT, group="keeper", stateful=True)
        def keeper(batch: djp.Batch) -> None:
            for record in batch:
                batch.state.set("claim", record.data["claim"])

        keeper.register(stream)
        claims = [stream.payloads.put(b"%d" % n).claim for n in range(2)]
        for claim in claims:
            stream.publish(LIGHT, [LIGHT.event(claim=claim.to_dict())])
            djp.run_pending(stream, keeper, state_folder=tmp_path / "state")
        trimmed(stream, clock)
        # The changelog keeps both, as long as nothing compacts it.
        assert collected(stream, later).in_use == 2
        stream.delete_group("keeper")
        collected(stream, later)
        assert payloads_of(stream) == []

    def test_emitted_events(self, stream: EventStream, clock: Clock, later: Passing) -> None:
        @djp.consumer(topic=LIGHT, group="making", emits=[HEAVY])
        def making(batch: djp.Batch) -> None:
            for record in batch:
                batch.emit(HEAVY.event(text=TEXT, n=record.data["n"]))

        making.register(stream)
        stream.publish(LIGHT, [LIGHT.event(n=1)])
        djp.run_pending(stream, making)
        assert collected(stream, later).in_use == 1
        assert next(stream.records(HEAVY, 0)).data == {"text": TEXT, "n": 1}

    def test_on_postgresql(self, postgres_url: str, tmp_path: Path, clock: Clock, later: Passing) -> None:
        with open_stream(postgres_url, payloads=open_payload_store(tmp_path / "p"), clock=clock) as stream:
            stream.create_topic(HEAVY)
            stream.publish(HEAVY, [HEAVY.event(text=TEXT, n=n) for n in range(100)])
            assert (collected(stream, later).in_use, len(payloads_of(stream))) == (100, 100)
            trimmed(stream, clock)
            collected(stream, later)
            assert payloads_of(stream) == []

    @pytest.mark.parametrize("database", ["sqlite", "postgresql"])
    def test_what_moves_while_it_is_asked_is_found(
        self, request: pytest.FixtureRequest, tmp_path: Path, database: str
    ) -> None:
        """The dead letter is read after the records: its record goes, and it comes, while the records are read."""
        target = request.getfixturevalue("postgres_url") if database == "postgresql" else tmp_path / "stream.db"
        clock = Clock()
        with open_stream(target, payloads=open_payload_store(tmp_path / "p"), clock=clock) as stream:
            stream.create_topic(LIGHT)
            claim = stream.payloads.put(b"x").claim
            for n in range(200):
                stream.publish(LIGHT, [LIGHT.event(n=n)])
            stream.publish(LIGHT, [LIGHT.event(claim=claim.to_dict())])
            with open_stream(target, payloads=open_payload_store(tmp_path / "p"), clock=clock) as other:
                asking = stream.coordinator.references()
                held = [next(asking)]
                trimmed(other, clock)
                held += asking
                (key,) = {key for one in held for key in keys_in(one)}
                assert claim.uri.endswith(key)
                assert list(other.coordinator.references()) == []


class TestWhatIsNamed:
    """Keys in bytes."""

    KEY = "sha256/ab/" + "c" * 62

    @pytest.mark.parametrize("suffix", ["", ".zst", ".0123456789ab", ".0123456789ab.zst"])
    @pytest.mark.parametrize(
        "prefix", ["", "s3://b/", "file:///attempts/x/", "s3://b/expiring/2026-01-01/", f"s3://b/{KEY}/"]
    )
    def test_wherever_the_store_lies(self, prefix: str, suffix: str) -> None:
        assert self.KEY + suffix in set(keys_in(f"{prefix}{self.KEY}{suffix}".encode()))

    @given(before=st.binary(max_size=20), after=st.binary(max_size=20))
    def test_whatever_stands_beside_it(self, before: bytes, after: bytes) -> None:
        assert self.KEY in set(keys_in(before + self.KEY.encode() + after))
        output = "attempts/g/0123/1/output.parquet"
        assert output in set(keys_in(before + output.encode() + after, [3, len(output)]))

    @given(
        st.recursive(
            st.none() | st.integers(-(2**63), 2**64 - 1) | st.text(),
            lambda one: st.lists(one) | st.dictionaries(st.text(), one),
        )
    )
    def test_within_any_data(self, other: Any) -> None:
        for encode in (msgspec.msgpack.encode, msgspec.json.encode):
            held = encode([other, "attempts/a", 97, self.KEY, 46, "attempts/b", other])
            assert {self.KEY, "attempts/a", "attempts/b"} <= set(keys_in(held, [10]))

    def test_much_of_it_is_read_in_time(self) -> None:
        for held in (b"attempts/" * 100_000, b"sha256/ab/" * 100_000, b"\\" * 1_000_000, b"attempts" + b"\\" * 500_000):
            assert sum(1 for _ in keys_in(held, [20])) <= 200_000

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "sha256",
            "sha256/ab/cd",
            "sha256/AB/" + "C" * 62,
            "sha256/ab/" + "c" * 63,
            "sha256/ab/" + "c" * 62 + ".gz",
            "x/sha256/ab/" + "c" * 62,
            "sha256/ab/" + "c" * 62 + "/data",
            "expiring/2026-13-01/sha256/ab/" + "c" * 62,
            "expiring/0000-00-00/sha256/ab/" + "c" * 62,
            "expiring/soon/sha256/ab/" + "c" * 62,
            "expiring/2026-01-01/other",
            "attempts/",
            "attempts/with a space",
            "attempt/x",
        ],
    )
    def test_what_is_no_payload(self, key: str) -> None:
        assert goes_at(key) is None

    def test_what_is_one(self) -> None:
        assert goes_at(self.KEY) == goes_at("attempts/g/b/1/output.txt") == 0
        assert goes_at(f"expiring/2026-01-01/{self.KEY}.zst") == datetime(2026, 1, 1, tzinfo=timezone.utc).timestamp()


class TestDryRun:
    """It changes nothing."""

    def test_the_whole_tree(self, tmp_path: Path, later: Passing, clock: Clock) -> None:
        with open_stream(tmp_path / "stream.db", clock=clock) as stream:
            stream.create_topic(HEAVY)
            stream.publish(HEAVY, [HEAVY.event(text=TEXT)])
            folder = tmp_path / "stream-payloads"
            for n in range(4):
                before = tree(folder)
                report = stream.collect_payloads()
                assert (report.dry_run, tree(folder)) == (True, before)
                stream.payloads.put(b"%d" % n)
                stream.payloads.put(b"%d expires" % n, expires_in="1s")
                (folder / ".upload-left").write_bytes(b"x")
                later(stream.payloads)
                later(stream.payloads, 60)
                if n:
                    stream.collect_payloads(dry_run=False)
            stream.payloads.put(b"new garbage")
            later(stream.payloads)
            before = tree(folder)
            shown = stream.collect_payloads()
            assert tree(folder) == before
            done = stream.collect_payloads(dry_run=False)
            assert {found.key: found.fate for found in shown.garbage} == {
                found.key: found.fate for found in done.garbage
            }
            assert {"condemned", "waiting", "deleted"} <= set(done.counts)
            assert msgspec.structs.replace(shown, dry_run=False, garbage=[]) == msgspec.structs.replace(
                done, garbage=[]
            )

    def test_on_a_server(self, s3: Place, faulty_s3: FaultyS3, later: Passing) -> None:
        place = Place(s3.target, {**s3.settings, "endpoint_url": faulty_s3.endpoint_url}, s3.server)
        store = place.open(room="list")
        store.put(b"x")
        later(store)
        faulty_s3.clear()
        assert collect(place.open(), [ListedRoom()]).count("condemned") == (1, 1)
        assert {method for method, _ in faulty_s3.counts} == {"GET"}


class TestGrace:
    """At least ten minutes; young payloads are not looked at."""

    @pytest.mark.parametrize("grace", ["9min", 0, "599s"])
    def test_too_short(self, tmp_path: Path, grace: Any) -> None:
        with pytest.raises(InvalidSettingError, match="at least 600 s"):
            collect(open_payload_store(tmp_path), [], grace=grace)

    def test_as_long_as_told(self, place: Place, later: Passing) -> None:
        store = place.open(room="list")
        store.put(b"x")
        later(store, 3500)
        assert collect(store, [ListedRoom()], grace="1h", dry_run=False).young == 1
        later(store, 200)
        for _ in range(3):
            assert keys(store, "sha256/") != []
            collect(store, [ListedRoom()], grace="1h", dry_run=False)
            later(store, 2000)
        collect(store, [ListedRoom()], grace="1h", dry_run=False)
        assert keys(store, "sha256/") == []


class TestExpiry:
    """What expires goes a grace period after its day, named or not; and not before."""

    def test_by_the_day_in_its_key(self, stream: EventStream, later: Passing) -> None:
        store = stream.payloads
        stored = store.put(b"for some days", expires_in="2d")
        stream.publish(LIGHT, [LIGHT.event(claim=stored.claim.to_dict())])
        today = datetime.now(timezone.utc)

        def at(days: int, what: bytes) -> str:
            """Put what expires so many days from now."""
            key = (
                f"expiring/{today + timedelta(days=days):%Y-%m-%d}/{content_key(sha256(what).hexdigest(), None, None)}"
            )
            store.objects.put(key, content(what), media_type="a/b")
            return key

        unnamed, gone = at(4, b"unnamed"), [at(-2, b"long ago"), at(-60, b"longer ago")]
        later(store)
        kept = {stored.ref.key, unnamed}
        shown = stream.collect_payloads()
        assert (shown.counts, shown.in_use) == ({"expired": (2, 18)}, 2)
        assert {*kept, *gone} < set(keys(store))
        assert stream.collect_payloads(dry_run=False).counts == {"expired": (2, 18)}
        assert [key for key in keys(store) if key.startswith("expiring/")] == sorted(kept)
        assert stream.collect_payloads(dry_run=False).counts == {}


class TestWhatIsLeftAlone:
    """Other people's objects, other prefixes, the bucket's settings."""

    FOREIGN = (
        "readme.txt",
        "sha256/readme",
        "sha256/ab/" + "c" * 61,
        "docker/registry/v2/blobs/sha256/ab/" + "c" * 62,
        "expiring/2020-13-45/sha256/ab/" + "c" * 62,
        "expiring/2020-01-01/readme",
        "pointers/assets/a/=value",
        "gc/other",
    )

    def test_foreign_objects(self, place: Place, later: Passing) -> None:
        store, outside = place.open(room="list"), place.at(f"{place.target}-2").open()
        store.put(b"garbage")
        own = set(keys(store))
        for key in self.FOREIGN:
            store.objects.put(key, content(b"foreign"), media_type="a/b")
        for neighbour in (outside, store.within("sha256-2"), store.within("other")):
            neighbour.put(b"of somebody else")
        others = keys(outside)
        for _ in range(4):
            later(store)
            report = collect(place.open(), [ListedRoom()], dry_run=False)
        assert report.foreign == len(self.FOREIGN) - 2 + 2
        left = {*keys(store), *(key for key in self.FOREIGN if key.startswith("gc/"))}
        assert left == {*own, *self.FOREIGN, *keys(store, "sha256-2/"), *keys(store, "other/")} - {
            key for key in own if key.startswith("sha256/")
        }
        assert keys(outside) == others

    def test_lifecycle_rules_of_the_bucket(self, s3: Place, later: Passing) -> None:
        client = s3.server.client()
        rules = {"Rules": [{"ID": "old", "Status": "Enabled", "Filter": {"Prefix": "x/"}, "Expiration": {"Days": 5}}]}
        client.put_bucket_lifecycle_configuration(Bucket=s3.bucket, LifecycleConfiguration=rules)
        before = client.get_bucket_lifecycle_configuration(Bucket=s3.bucket)["Rules"]
        store = s3.open(room="list")
        store.put(b"garbage", expires_in="3d")
        store.put(b"garbage")
        for _ in range(4):
            later(store)
            collect(store, [ListedRoom()], dry_run=False)
        assert client.get_bucket_lifecycle_configuration(Bucket=s3.bucket)["Rules"] == before
        assert keys(store, "sha256/") == []

    def test_uploads_that_were_given_up(self, s3: Place, later: Passing) -> None:
        client, store = s3.server.client(), s3.open(room="list")
        store.put(b"x")
        for key in ("pre/sha256/ab/" + "c" * 62, "pre/attempts/g/b/1/output.bin", "pre/readme", "other/sha256/ab/x"):
            client.create_multipart_upload(Bucket=s3.bucket, Key=key)

        def unfinished() -> list[str]:
            return sorted(one["Key"] for one in client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", ()))

        assert collect(store, [ListedRoom()], dry_run=False).unfinished == 0
        later(store, DAY + 60)
        assert collect(store, [ListedRoom()]).unfinished == 2
        assert len(unfinished()) == 4
        assert collect(store, [ListedRoom()], dry_run=False).unfinished == 2
        assert unfinished() == ["other/sha256/ab/x", "pre/readme"]

    def test_temporary_files(self, tmp_path: Path, later: Passing) -> None:
        store = open_payload_store(tmp_path / "p", room="list")
        store.announce()
        with store.writer() as writing:
            writing.file.write(b"x" * 9 * MIB)
            assert len(list((tmp_path / "p").glob(".upload-*"))) == 1
            assert collect(store, [ListedRoom()], dry_run=False).unfinished == 0
        (tmp_path / "p" / ".upload-left").write_bytes(b"x")
        (tmp_path / "p" / ".other").write_bytes(b"x")
        later(store, DAY + 60)
        assert collect(store, [ListedRoom()], dry_run=False).unfinished == 1
        assert sorted(path.name for path in (tmp_path / "p").glob(".*")) == [".lock", ".other"]

    def test_races_that_were_left(self, place: Place, later: Passing) -> None:
        store = place.open(room="list")
        store.put(b"x")
        store.objects.replace_document("gc/race-left", b"")
        collect(store, [ListedRoom()], dry_run=False)
        assert store.objects.read_document("gc/race-left") is not None
        later(store, DAY + 60)
        collect(store, [ListedRoom()], dry_run=False)
        assert store.objects.read_document("gc/race-left") is None
        assert not [found.key for found in store.objects.list("gc/race-")]


class TestRefusals:
    """What it cannot prove, it does not touch."""

    def test_a_room_that_cannot_be_asked(self, place: Place, later: Passing) -> None:
        place.open(room="stream").put(b"x")
        place.open(room="other").put(b"y")
        later(place.open())
        before = keys(place.open())
        for rooms in ([], [ListedRoom("stream")], [ListedRoom("stream"), ListedRoom("third")]):
            for dry_run in (True, False):
                with pytest.raises(
                    CollectionRefusedError, match=r"\['other'.* keep references into .*run the coll"
                ) as no:
                    collect(place.open(), rooms, dry_run=dry_run)
                assert no.value.facts["missing"][0] == "other"
        assert [*keys(place.open()), *(one.key for one in place.objects().list("gc/"))] == before
        assert collect(place.open(), [ListedRoom("stream"), ListedRoom("other"), ListedRoom("third")]).payloads == 2

    def test_no_room_at_all(self, place: Place) -> None:
        with pytest.raises(CollectionRefusedError, match="nobody has announced"):
            collect(place.open(), [ListedRoom()])
        place.open().put(b"of somebody who keeps references elsewhere")
        with pytest.raises(CollectionRefusedError, match="nobody has announced"):
            collect(place.open(), [ListedRoom()], dry_run=False)

    def test_the_store_above_the_stream(self, stream: EventStream, place: Place) -> None:
        stream.publish(HEAVY, [HEAVY.event(text=TEXT)])
        with pytest.raises(CollectionRefusedError, match="nobody has announced"):
            collect(place.open(), [ListedRoom("stream")], dry_run=False)

    @pytest.mark.parametrize("headers", [("If-None-Match",), ("If-Match",), ("If-None-Match", "If-Match")])
    def test_a_server_that_ignores_conditions(
        self, faulty: Place, faulty_s3: FaultyS3, later: Passing, headers: tuple[str, ...]
    ) -> None:
        store = faulty.open(room="list")
        store.put(b"x")
        later(store)
        faulty_s3.on(StripHeaders(headers), times=None)
        before = keys(store)
        with pytest.raises(CollectionRefusedError, match="no atomic conditional writes: of 8 writers of one"):
            collect(faulty.open(), [ListedRoom()], dry_run=False)
        faulty_s3.clear()
        assert [found.key for found in store.objects.list()] == before
        assert collect(faulty.open(), [ListedRoom()], dry_run=False).count("condemned") == (1, 1)

    def test_a_server_that_has_no_conditions(self, faulty: Place, faulty_s3: FaultyS3) -> None:
        store = faulty.open(room="list")
        store.put(b"x")
        faulty_s3.on(Refuse(501, "NotImplemented"), method="PUT", key="gc/", times=None)
        with pytest.raises(CollectionRefusedError, match="it refuses them"):
            collect(faulty.open(), [ListedRoom()], dry_run=False)

    def test_a_folder_without_a_lock(self, tmp_path: Path) -> None:
        store = open_payload_store(tmp_path, room="list")
        store.put(b"x")
        before = tree(tmp_path)
        with pytest.raises(CollectionRefusedError, match="no atomic conditional writes"):
            collect(PayloadStore(Unlocked(tmp_path)), [ListedRoom()], dry_run=False)
        assert {name for name in tree(tmp_path) if name != ".lock"} == {name for name in before if name != ".lock"}

    def test_a_winner_who_is_not_told(self, faulty: Place, faulty_s3: FaultyS3) -> None:
        store = faulty.open(room="list")
        store.put(b"x")
        faulty_s3.on(LoseResponse(), method="PUT", key="gc/race", times=8)
        with pytest.raises(PayloadStoreUnavailableError, match="none was told"):
            collect(faulty.open(), [ListedRoom()], dry_run=False)
        faulty_s3.clear()
        collect(faulty.open(), [ListedRoom()], dry_run=False)

    def test_a_list_that_is_none(self, place: Place, later: Passing) -> None:
        store = place.open(room="list")
        store.put(b"x")
        later(store)
        store.objects.replace_document("gc/condemned", b"not a list")
        for work in (lambda: collect(store, [ListedRoom()], dry_run=False), lambda: place.open().put(b"y")):
            with pytest.raises(djp.errors.PayloadStoreRefusedError, match="not the list of condemned"):
                work()


class Unlocked(LocalObjects):
    """A folder whose conditional writes look, and then write."""

    def write_document(self, key: str, body: bytes, *, expected: str | None) -> str:
        there = self.read_document(key)
        if (there.version if there else None) != expected:
            raise DocumentChanged(key)
        _all_have_looked.wait(30)
        self.replace_document(key, body)
        return ""


_all_have_looked = threading.Barrier(8)


class TestOutages:
    """Whatever is away: nothing wrong is deleted, and the next one goes on."""

    def test_the_stream(self, stream: EventStream, later: Passing, monkeypatch: pytest.MonkeyPatch) -> None:
        stream.publish(HEAVY, [HEAVY.event(text=TEXT, n=n) for n in range(3)])
        garbage = stream.payloads.put(b"garbage").claim
        for _ in range(2):
            later(stream.payloads)
            stream.collect_payloads(dry_run=False)
        later(stream.payloads)
        real = stream.coordinator.references

        def broken() -> Iterator[bytes]:
            yield next(iter(real()))
            raise StreamUnavailableError("the database is away")

        before = keys(stream.payloads)
        with monkeypatch.context() as patch:
            patch.setattr(stream.coordinator, "references", broken)
            with pytest.raises(StreamUnavailableError):
                stream.collect_payloads(dry_run=False)
        assert keys(stream.payloads) == before
        assert stream.collect_payloads(dry_run=False).count("deleted")[0] == 1
        with pytest.raises(PayloadMissingError):
            stream.payloads.info(garbage)

    def test_the_server_at_any_request(self, faulty: Place, faulty_s3: FaultyS3, later: Passing) -> None:
        """Each request of a collection that condemns and deletes fails in turn; the next collection finishes."""
        store = faulty.open(room="list", max_attempts=1)
        used = store.put(b"used").claim
        room = ListedRoom("list", used.to_json())
        for number in range(100):
            for part in range(2):  # one payload is due to be deleted then, another to be confirmed, a third condemned
                store.put(b"%d, %d" % (number, part))
                later(store)
                collect(store, [room], dry_run=False)
            store.put(b"%d, new" % number)
            later(store)
            faulty_s3.clear()
            if number:
                faulty_s3.on(StripHeaders(()), times=number)  # these go through
            refused = faulty_s3.on(Refuse(503, "SlowDown"))
            with contextlib.suppress(PayloadStoreUnavailableError):
                collect(store, [room], dry_run=False)
            faulty_s3.clear()
            assert store.read(used) == b"used"
            later(store, 800)
            if not refused.met:
                break
        assert number > 8, "every request of one was refused once"
        for _ in range(4):
            later(store)
            collect(store, [room], dry_run=False)
        assert keys(store, "sha256/") == [used.uri.removeprefix(f"{store.uri}/")]
        assert Condemned(store.objects).read() == {}


class TestManyObjects:
    """More than a page, a request and a chunk hold."""

    def test_more_than_a_thousand(self, place: Place, later: Passing, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collection, "_LOOKED_AT_ONCE", 400)
        count = 2_300 if place.is_folder else 1_100
        store = place.open(room="list")
        store.announce()
        names = [f"attempts/g/{n:04}/1/output.bin" for n in range(count)]
        for name in names:
            store.objects.replace_document(name, b"x")
        room = ListedRoom("list", json.dumps(names[::10]).encode())
        for _ in range(2):
            later(store)
            report = collect(store, [room], dry_run=False)
        kept = len(names[::10])
        assert report.in_use == kept
        assert len(report.garbage) == min(count - kept, 1000)
        later(store)
        report = collect(store, [room], dry_run=False)
        assert report.count("deleted") == (count - kept, count - kept)
        assert keys(store, "attempts/") == names[::10]

    def test_the_largest_are_shown(self, tmp_path: Path, later: Passing, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(collection, "_SHOWN", 3)
        store = open_payload_store(tmp_path, room="list")
        for n in range(10):
            store.put(b"x" * n)
        later(store, 2 * DAY)
        report = collect(store, [ListedRoom()])
        assert [found.bytes for found in report.garbage] == [9, 8, 7]
        assert report.counts == {"condemned": (10, 45)}
        (largest, *_) = report.garbage
        assert abs((datetime.now(timezone.utc) - largest.stored_at).total_seconds() - 2 * DAY) < 60


def test_collections_at_once(place: Place, later: Passing) -> None:
    """Of several at the same time each payload is deleted by one."""
    store = place.open(room="list")
    for n in range(40):
        store.put(b"%d" % n)
    stores = [place.open() for _ in range(3)]
    for one in stores:  # each proves its writes now, before time passes for what others do meanwhile
        assert collect(one, [ListedRoom()], dry_run=False).young == 40
    for round_ in range(3):
        later(store)
        reports = at_once([lambda one=one: collect(one, [ListedRoom()], dry_run=False) for one in stores])
        assert all(isinstance(report, CollectionReport) for report in reports), reports
        if round_ == 2:
            assert sum(report.count("deleted")[0] for report in reports) == 40
    assert keys(store, "sha256/") == []
