"""Whether consumers make a chain, and how it is drawn."""

import random
import re
from typing import Any

import pytest

import djp_dagster as djp
from djp_dagster import EventDag, Topic
from djp_dagster.errors import EventDagError, InvalidSettingError
from tests.dags.kit import meeting, passing, topic

UPLOADS, VIDEO, IMAGES, PRODUCTS, MAILS = map(topic, ("uploads", "video", "images", "products", "mails"))
TRANSCODE = passing("transcode", [UPLOADS], [VIDEO])
RESIZE = passing("resize", [UPLOADS], [IMAGES])
CREATE = meeting("create", {"video": VIDEO, "images": IMAGES}, [PRODUCTS])
MAIL = passing("mail", [PRODUCTS], [MAILS])


def names(topics: Any) -> list[str]:
    return [one.name for one in topics]


def groups(consumers: Any) -> list[str]:
    return [one.group for one in consumers]


def test_a_chain_that_branches_and_meets(seed: random.Random) -> None:
    members = [TRANSCODE, RESIZE, CREATE, MAIL]
    for _ in range(10):
        seed.shuffle(members)
        dag = EventDag(members, name="catalog")
        assert names(dag.topics) == ["images", "mails", "products", "uploads", "video"]
        assert (names(dag.sources), names(dag.results)) == (["uploads"], ["mails"])
        assert sorted(groups(dag.readers("uploads"))) == ["resize", "transcode"]
        assert dag.readers("mails") == []
        assert (dag.owner("video"), dag.owner("uploads")) == (TRANSCODE, None)
        order = groups(dag.in_order())
        assert sorted(order[:2]) == ["resize", "transcode"]
        assert order[2:] == ["create", "mail"]


def test_in_order_those_before_others_come_first(seed: random.Random) -> None:
    topics = [topic(f"t{n}") for n in range(40)]
    # Every consumer reads earlier topics than it emits to.
    members = []
    for number in range(1, 40):
        reads = seed.sample(topics[:number], min(number, seed.randint(1, 3)))
        members.append(passing(f"c{number}", reads, [topics[number]]))
    seed.shuffle(members)
    dag = EventDag(members)
    done = set(names(dag.sources))
    for consumer in dag.in_order():
        assert set(names(consumer.topics)) <= done
        done |= set(names(consumer.emits))
    assert set(names(topics)) >= done
    assert len(dag.in_order()) == 39


def refused(told: str, *consumers: Any, **settings: Any) -> EventDagError:
    """Why the consumers make no chain; in these words."""
    with pytest.raises(EventDagError, match="^" + re.escape(told)) as error:
        EventDag(consumers, name="catalog", **settings)
    return error.value


class TestCycles:
    """An event would go round for ever."""

    def test_of_itself(self) -> None:
        error = refused(
            "event DAG 'catalog' has a cycle: again -> video -> again; an event would go round for ever: emit to "
            "another topic",
            passing("again", [VIDEO], [VIDEO]),
        )
        assert error.facts["path"] == ["again", "video", "again"]

    def test_of_many_with_its_path_alone(self) -> None:
        a, b, c = topic("a"), topic("b"), topic("c")
        error = refused(
            "event DAG 'catalog' has a cycle: two -> b -> three -> c -> two;",
            passing("one", [UPLOADS], [a]),
            passing("two", [a, c], [b]),
            passing("three", [b], [c, VIDEO]),
            passing("four", [VIDEO], [IMAGES]),
        )
        assert error.facts["path"] == ["two", "b", "three", "c", "two"]

    def test_through_a_join_and_its_late_topic(self) -> None:
        refused(
            "event DAG 'catalog' has a cycle: create -> video -> create;",
            meeting("create", {"video": VIDEO, "images": IMAGES}, late=VIDEO),
        )

    def test_through_the_copy_of_an_input(self) -> None:
        other = topic("other", key="image")
        copying = meeting("create", {"video": VIDEO, "other": other}, [other], repartition=True)
        refused(
            "event DAG 'catalog' has a cycle: create-repartition-other -> other-by-k-for-create -> create -> other -> "
            "create-repartition-other;",
            copying,
        )

    def test_a_group_may_be_called_as_a_topic_is(self) -> None:
        """It is no cycle that a consumer of the topic 'video' is called 'video', too."""
        dag = EventDag([passing("images", [UPLOADS], [VIDEO]), passing("video", [VIDEO], [IMAGES])])
        assert groups(dag.in_order()) == ["images", "video"]

    def test_branches_that_meet_again_are_none(self) -> None:
        a, b, c, d = topic("a"), topic("b"), topic("c"), topic("d")
        members = [passing(f"p{n}", [read], [emit]) for n, (read, emit) in enumerate([(a, b), (b, c), (c, d)])]
        EventDag([*members, passing("short", [a], [MAILS]), passing("end", [b, c, d, MAILS])])


class TestTopics:
    """Each has one declaration and one owner."""

    def test_two_owners(self) -> None:
        error = refused(
            "event DAG 'catalog': topic 'video' is emitted by 'transcode' and 'other'; give each its own, so that one "
            "consumer answers for what is in it",
            TRANSCODE,
            passing("other", [UPLOADS], [VIDEO]),
        )
        assert (error.facts["topic"], error.facts["owners"]) == ("video", ["transcode", "other"])

    def test_two_declarations(self) -> None:
        error = refused(
            "event DAG 'catalog': topic 'video' is declared twice and differently: Topic(name='video', partitions=1, "
            "key='k'",
            TRANSCODE,
            passing("other", [topic("video", partitions=2)]),
        )
        assert "and Topic(name='video', partitions=2" in str(error)
        assert error.facts["topic"] == "video"

    def test_two_declarations_one_of_them_as_a_source(self) -> None:
        refused(
            "event DAG 'catalog': topic 'uploads' is declared twice and differently",
            TRANSCODE,
            sources=[topic("uploads", partitions=2)],
        )


class TestWhatNothingLeadsTo:
    """Only if the sources are named can it be told."""

    ADVICE = "none of its consumers emits that, and its sources are ['uploads']; add who emits it, or name it a source"

    def test_a_part_of_a_join(self) -> None:
        error = refused(
            "event DAG 'catalog': nothing leads to the parts ['images'] of join 'create', so no key would be complete: "
            + self.ADVICE,
            TRANSCODE,
            CREATE,
            sources=[UPLOADS],
        )
        assert (error.facts["group"], error.facts["topics"]) == ("create", ["images"])

    def test_a_part_that_is_copied(self) -> None:
        refused(
            "event DAG 'catalog': nothing leads to consumer 'create-repartition-other', which reads ['other']: "
            + self.ADVICE,
            TRANSCODE,
            meeting("create", {"video": VIDEO, "other": topic("other", key="image")}, repartition=True),
            sources=[UPLOADS],
        )

    def test_a_consumer(self) -> None:
        error = refused(
            "event DAG 'catalog': nothing leads to consumer 'mail', which reads ['products']: " + self.ADVICE,
            TRANSCODE,
            MAIL,
            sources=[UPLOADS],
        )
        assert (error.facts["group"], error.facts["topics"]) == ("mail", ["products"])

    def test_one_of_the_topics_of_a_consumer(self) -> None:
        error = refused(
            "event DAG 'catalog': nothing leads to the topics ['products'], which consumer 'both' reads: "
            + self.ADVICE,
            TRANSCODE,
            passing("both", [VIDEO, PRODUCTS]),
            sources=[UPLOADS],
        )
        assert (error.facts["group"], error.facts["topics"]) == ("both", ["products"])

    def test_all_if_there_are_no_sources(self) -> None:
        refused(
            "event DAG 'catalog': nothing leads to consumer 'transcode', which reads ['uploads']", TRANSCODE, sources=[]
        )

    def test_named_sources_may_be_more_than_those_found(self) -> None:
        dag = EventDag([CREATE], sources=[VIDEO, IMAGES, MAILS])
        assert names(dag.sources) == ["video", "images", "mails"]
        assert names(dag.topics) == ["images", "products", "video"]


@pytest.mark.parametrize(("members", "found"), [([], "[]"), ([MAIL, MAIL], "['mail', 'mail']")])
def test_consumers_of_different_groups_are_needed(members: Any, found: str) -> None:
    with pytest.raises(InvalidSettingError) as error:
        EventDag(members, name="catalog")
    assert str(error.value) == f"event DAG 'catalog' needs consumers of different groups, not {found}"
    assert error.value.facts["setting"] == "consumers"


def test_helpers_are_taken_in_before_whom_they_help() -> None:
    copying = meeting("create", {"video": VIDEO, "other": topic("other", key="image")}, [PRODUCTS], repartition=True)
    dag = EventDag([copying, TRANSCODE])
    assert groups(dag.consumers) == ["create-repartition-other", "create", "transcode"]
    assert groups(dag.in_order()) == ["create-repartition-other", "transcode", "create"]
    assert names(dag.sources) == ["other", "uploads"]
    assert names(dag.topics) == ["other", "other-by-k-for-create", "products", "uploads", "video"]


def test_the_outline_lists_consumers_in_order() -> None:
    assert EventDag([MAIL, CREATE, RESIZE, TRANSCODE]).outline().splitlines() == [
        "uploads        -> transcode -> video",
        "uploads        -> resize    -> images",
        "video + images -> create    -> products",
        "products       -> mail      -> mails",
    ]


def test_the_diagram_of_a_chain() -> None:
    assert EventDag([MAIL, CREATE, RESIZE, TRANSCODE]).mermaid().splitlines() == [
        "flowchart LR",
        "    t_images([images])",
        "    t_mails([mails])",
        "    t_products([products])",
        "    t_uploads([uploads])",
        "    t_video([video])",
        "    c_transcode[transcode]",
        "    t_uploads --> c_transcode",
        "    c_transcode --> t_video",
        "    c_resize[resize]",
        "    t_uploads --> c_resize",
        "    c_resize --> t_images",
        "    c_create{{create}}",
        "    t_video --> c_create",
        "    t_images --> c_create",
        "    c_create --> t_products",
        "    c_mail[mail]",
        "    t_products --> c_mail",
        "    c_mail --> t_mails",
    ]


def test_names_alike_are_nodes_of_their_own() -> None:
    alike = [Topic(name) for name in ("a-b", "a.b", "a_b", "a_b_2")]
    diagram = EventDag([passing("c-d", alike), passing("c_d", alike[:1])]).mermaid().splitlines()
    assert diagram == [
        "flowchart LR",
        "    t_a_b([a-b])",
        "    t_a_b_2([a.b])",
        "    t_a_b_3([a_b])",
        "    t_a_b_2_2([a_b_2])",
        "    c_c_d[c-d]",
        "    t_a_b --> c_c_d",
        "    t_a_b_2 --> c_c_d",
        "    t_a_b_3 --> c_c_d",
        "    t_a_b_2_2 --> c_c_d",
        "    c_c_d_2[c_d]",
        "    t_a_b --> c_c_d_2",
    ]


def test_a_table_is_the_end_of_a_branch() -> None:
    table = djp.Table("latest", topic=PRODUCTS)
    dag = EventDag([CREATE, table])
    assert (names(dag.results), groups(dag.in_order())) == ([], ["create", "latest"])
