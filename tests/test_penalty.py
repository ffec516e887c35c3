"""The repetition penalty that applies when the user has not chosen one."""

from typing import Any

import pytest

from mlx_poe.generation.reply_form import with_usual_penalty


@pytest.mark.parametrize(
    ("options", "specialist", "penalty"),
    [
        # The model cards recommend it.
        ({}, True, 1.15),
        ({"repetition_penalty": None, "tools": None}, True, 1.15),
        # Function calls repeat the names and values that they were given.
        ({"tools": []}, True, 1.0),
        ({"json_schema": {}}, True, 1.0),
        ({"repetition_penalty": 1.3, "tools": []}, True, 1.3),
        ({}, False, None),
        ({"tools": []}, False, None),
    ],
)
def test_a_specialist_is_penalized_as_its_model_card_recommends_unless_constrained(
    options: dict[str, Any], specialist, penalty
):
    found = with_usual_penalty(options, specialist)
    assert found.pop("repetition_penalty", None) == penalty
    assert found == {k: v for k, v in options.items() if k != "repetition_penalty"}
