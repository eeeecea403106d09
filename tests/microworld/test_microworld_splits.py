import hashlib
import json
from itertools import islice

import pytest

from rankloom import microworld
from rankloom.errors import DataError, SettingsError
from rankloom.microworld.splits import split_of
from rankloom.microworld.table import document_stream, stream


def prompts(task, split, seed, n=400):
    return {item.prompt for item in islice(stream(task, split, seed), n)}


@pytest.mark.parametrize("task", microworld.tasks())
def test_no_prompt_crosses_a_split_for_any_seed(task):
    train, validation, test = (prompts(task, split, 1) | prompts(task, split, 2) for split in microworld.SPLITS)
    assert train
    assert validation
    assert test
    assert not train & test
    assert not train & validation
    assert not validation & test


def test_documents_do_not_cross():
    found = [set(islice(document_stream(split, 3), 400)) for split in microworld.SPLITS]
    assert not found[0] & found[2]
    assert not found[0] & found[1]


def test_meanings_are_shared_by_all_languages():
    """A sentence tested in one language must not be trained in another: the common tongue would leak it."""
    trained = {item.answer for item in islice(stream("from_aru", "train"), 2000)}
    tested = {item.prompt.removeprefix("To Dwimi: ") for item in islice(stream("to_dwimi", "test"), 500)}
    assert not trained & tested


def test_shares_are_eight_one_one():
    owners = [split_of(str(i)) for i in range(5000)]
    assert owners.count("train") == pytest.approx(4000, abs=120)
    assert owners.count("test") == pytest.approx(500, abs=80)


@pytest.mark.parametrize("task", ["list_rotate", "program_fix", "reading", "user_voice"])
def test_same_arguments_same_examples(task):
    once = microworld.examples(task, "train", 20, seed=4)
    assert once == microworld.examples(task, "train", 20, seed=4)
    assert once != microworld.examples(task, "train", 20, seed=5)
    assert microworld.examples(task, "train", 5, seed=4) == once[:5]


def test_the_generator_is_pinned():
    """The shipped weights know this very world; whoever changes it makes a new base and a new digest."""
    drawn = [[microworld.examples(task, "test", 3) for task in microworld.tasks()], microworld.documents("test", 20)]
    assert hashlib.blake2b(json.dumps(drawn).encode(), digest_size=8).hexdigest() == "f7b86d2c23ffe3be"


def test_examples_are_distinct_and_shaped():
    drawn = microworld.examples("add", "validation", 50)
    assert len({row["messages"][0]["content"] for row in drawn}) == 50
    for row in drawn:
        user, assistant = row["messages"]
        a, b = user["content"].removesuffix(" =").split(" + ")
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert int(assistant["content"]) == int(a) + int(b)


def test_an_exhausted_split_says_how_many_there_are():
    with pytest.raises(DataError, match=r"'places' has only (\d+) different examples in 'test'; ask for n=\1"):
        microworld.examples("places", "test", 10_000)


def test_errors_name_the_nearest():
    with pytest.raises(SettingsError, match="did you mean 'list_rotate'"):
        microworld.examples("list_rotat", "train", 1)
    with pytest.raises(SettingsError, match="did you mean 'validation'"):
        microworld.examples("add", "valid", 1)
    with pytest.raises(SettingsError, match="n must be 0 or more, got -1"):
        microworld.examples("add", "train", -1)
    with pytest.raises(SettingsError, match="did you mean 'test'"):
        microworld.documents("tests", 1)


def test_held_out_tasks_are_tasks_and_at_least_four():
    held_out = microworld.held_out()
    assert len(held_out) >= 4
    assert set(held_out) < set(microworld.tasks())
    assert microworld.DEMO_TASK in held_out


def test_documents_never_speak_of_held_out_things():
    text = "\n".join(islice(document_stream("train"), 3000)).lower()
    for word in ("dwimi", "rotate", "exchange", "grandmother", "fix:", "hill kelor", "well met", "greetings"):
        assert word not in text
