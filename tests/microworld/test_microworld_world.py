import subprocess
import sys
from random import Random

import pytest

from rankloom.microworld import minilang
from rankloom.microworld.language import Meaning, NounPhrase, common, languages
from rankloom.microworld.skills import HELD_OUT_LISTS, LISTS
from rankloom.microworld.users import Dish, dishes, users
from rankloom.microworld.world import world

SENTENCE = Meaning(NounPhrase("girl", True, "old"), "visit", True, NounPhrase("dog", False, ""))


def test_nothing_heavy_is_imported():
    code = "import sys, rankloom.microworld as m; m.examples('add', 'train', 2); print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_posts_are_unique_and_friends_form_one_ring():
    people = {p.name: p for p in world().people}
    assert len({(p.job, p.home) for p in people.values()}) == len(people) == 80
    name, seen = world().people[0].name, set()
    while name not in seen:
        seen.add(name)
        name = people[name].friend
    assert seen == set(people)


def test_another_seed_is_another_world():
    assert world(1) == world(1)
    assert not {p.name for p in world(1).people} <= {p.name for p in world(2).people}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("aru", "{girl}ki {old} {dog} ta{visit}"),
        ("beshi", "{visit}un {old} o{girl} {dog}"),
        ("kelor", "{dog} {visit}us {old} {girl}em"),
        ("dwimi", "{dog} ne{girl} {old} {visit}ak"),
    ],
)
def test_word_order_and_affixes(name, said):
    language = languages()[name]
    assert language.say(SENTENCE) == said.format(**language.lexicon)
    assert common(SENTENCE) == "the old girls visited the dog"


def test_hill_dialect_changes_sounds():
    plain, hill = (getattr(languages()["kelor"], say)(SENTENCE) for say in ("say", "say_hill"))
    assert hill == plain.replace("l", "r").replace("o", "u") != plain


def test_lexicons_share_no_word():
    words = [word for language in languages().values() for word in language.lexicon.values()]
    assert len(words) == len(set(words)) == 4 * 34


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("set a 3\nadd a 4\nshow a", [7]),
        ("set a 3\nset b 5\ntake b a\ndouble b\nshow b", [4]),
        ("set a 2\nshow a\nset a 9\nshow a", [2, 9]),
    ],
)
def test_programs_run(source, shown):
    program = minilang.parse(source)
    assert minilang.run(program) == shown
    assert minilang.text(program) == source
    assert minilang.review(program) == "ok"


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("set a 3\nadn a 4\nshow a", "line 2: adn is no command"),
        ("set a 3\nadd b 4\nshow a", "line 2: b was never set"),
        ("set a 3\nadd a c\nshow a", "line 2: c was never set"),
        ("set a 3\ndouble a", "nothing is shown"),
    ],
)
def test_reviews_name_the_line(source, fault):
    assert minilang.review(minilang.parse(source)) == fault


def test_every_planted_bug_is_found_and_its_repair_is_sound():
    rng = Random(0)
    for _ in range(300):
        program = minilang.draw_program(rng)
        case = minilang.draw_broken(rng, program)
        assert case.review != "ok"
        assert case.fixed == program
        assert minilang.review(case.fixed) == "ok"
        assert minilang.parse(minilang.text(case.program)) == case.program


def test_summary_says_every_line():
    program = minilang.parse("set a 3\nset b 5\ntake b a\ndouble b\nshow b")
    assert minilang.summary(program) == "set a to 3, set b to 5, take a from b, double b, show b"


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("list_reverse", lambda x: x[::-1]),
        ("list_rest", lambda x: x[1:]),
        ("list_rotate", lambda x: x[1:] + x[:1]),
        ("list_swap", lambda x: x[-1:] + x[1:-1] + x[:1]),
    ],
)
def test_list_answers(task, expected):
    draw, rng = (LISTS | HELD_OUT_LISTS)[task], Random(1)
    for _ in range(50):
        item = draw(rng)
        assert item.answer.split() == expected(item.prompt.split()[1:])


def test_ratings_follow_tastes():
    user = users()[0]
    other = next(kind for kind in ("soup", "cake") if kind != user.kind)
    assert user.rating(Dish("x", user.kind, user.loves)) == 5
    assert user.rating(Dish("x", other, user.dislikes)) == 1
    assert {u.rating(d) for u in users() for d in dishes()} == {1, 2, 3, 4, 5}


def test_voices_are_unique():
    assert len({user.greeting("Ada") for user in users()}) == len(users()) == 24
