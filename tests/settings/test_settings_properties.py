"""Whatever the settings: what is written is read back the same, and what is refused is refused as settings."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from settings_world import GARBAGE, PARTS, data_of, part

from rankloom import registry
from rankloom.core.plan import Plan
from rankloom.errors import RankloomError, SettingsError
from rankloom.settings import from_data, settings_of, to_data, yamltext
from rankloom.train.config import RunConfig, as_data
from rankloom.train.config import from_data as run_from_data
from rankloom.train.configfile import config_of, dump

quick = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
BASES = {kind: registry.load(base) for kind, base in registry._BASES.items()}


def refusal(call, *arguments):
    """What a refusal says; nothing where the call works. Any other error comes through."""
    try:
        call(*arguments)
    except RankloomError as error:
        return str(error)
    return ""


def through_yaml(data):
    return yamltext.parse(yamltext.dump(data), "text")[0]


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_every_registered_part_is_written_and_read_back(kind, name):
    base, kept = BASES[kind], []

    @quick
    @given(part(base, name))
    def check(data):
        try:
            made = from_data(base, data)
        except SettingsError:
            assume(False)
        kept.append(made)
        for full in (False, True):
            written = to_data(made, full=full)
            assert through_yaml(written) == written
            assert from_data(base, through_yaml(written)) == made

    target = registry.class_of(base, name)
    is_plan = not isinstance(target, type) and isinstance(target(), Plan)
    if is_plan:
        with pytest.raises(SettingsError, match="is a whole Plan, no method"):
            from_data(base, name)
        return
    check()
    assert kept


@quick
@given(data_of(RunConfig))
def test_a_run_is_written_and_read_back(data):
    data.get("train", {}).pop("seed", None)
    try:
        config = run_from_data(data)
    except SettingsError:
        assume(False)
    trusted = config.model is not None and config.model.trust_remote_code  # no file may say that: it is typed again
    again = config_of(dump(config), "text", ["trust_remote_code=true"] if trusted else [])
    assert again == config
    assert as_data(again) == as_data(config)


@pytest.mark.parametrize(("kind", "name"), PARTS)
def test_garbage_for_a_part_is_refused_as_settings(kind, name):
    known = [s.name for s in settings_of(registry.class_of(BASES[kind], name), BASES[kind])]

    @quick
    @given(st.dictionaries(st.sampled_from([*known, "name"]), GARBAGE, max_size=3))
    def check(data):
        assert len(refusal(from_data, BASES[kind], {**data, "name": name})) < 2000

    check()


@pytest.mark.parametrize("cls", [RunConfig, Plan])
def test_garbage_for_a_whole_is_refused_as_settings(cls):
    known = [s.name for s in settings_of(cls)]

    @settings(quick, max_examples=60)
    @given(st.dictionaries(st.sampled_from(known), GARBAGE, max_size=4) | GARBAGE)
    def check(data):
        assert len(refusal(from_data, cls, data)) < 2000

    check()


@settings(quick, max_examples=60)
@given(st.text(st.sampled_from("abmr:{}[]&*!|>#'\"-?~<,.=\n 019eE\t%@`\\") | st.characters(), max_size=40))
def test_any_text_is_a_configuration_or_refused(text):
    said = refusal(config_of, text, "run.yaml")
    assert not said or "run.yaml" in said


@settings(quick, max_examples=30)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [
                    "method",
                    "r",
                    "inner",
                    "inner.r",
                    "store",
                    "store.bits",
                    "lr",
                    "rules",
                    "plan",
                    "name",
                    "rank_pattern.q",
                    "inner.name",
                    "model",
                    "x",
                ]
            ),
            st.text(st.sampled_from("adloruqt:{}[]&*!0159.-en_ "), max_size=8)
            | st.sampled_from(["dora", "lora", "qlora", "normal_float", "[lora_plus]", "null"]),
        ),
        max_size=4,
    )
)
def test_any_changes_are_made_or_refused(changes):
    assert len(refusal(config_of, "", "", [f"{key}={said}" for key, said in changes])) < 2000
