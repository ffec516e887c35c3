"""The repetition penalty that applies when the user has not chosen one."""

from conftest import fixture

from mlx_poe.generation.penalty import default_repetition_penalty


def test_a_specialist_gets_the_penalty_that_its_model_card_recommends():
    assert default_repetition_penalty(fixture("poe-tiny-chat")[0]) == 1.15


def test_a_specialist_that_is_offered_functions_may_repeat_what_it_was_given():
    assert default_repetition_penalty(fixture("poe-tiny-tool")[0], formal=True) == 1.0


def test_a_base_model_has_no_default_penalty():
    base = fixture("poe-tiny")[0]
    assert default_repetition_penalty(base) is None
    assert default_repetition_penalty(base, formal=True) is None
