"""Cards are plain data."""

from __future__ import annotations

import json
from dataclasses import fields

from sealmark.core.card import AttackCard, Card

CARD = Card(
    title="A toy",
    citation="nobody 2020",
    function=("ownership", "identity"),
    scenario="white-box",
    mechanism="none",
    capacity="zero-bit",
    type="passive watermark",
    target_models="any",
    needs_training=True,
    needs_data=False,
    reported="nothing",
    reproduced="nothing",
    broken_by=("anything",),
)
ATTACK = AttackCard("A toy", "nobody 2020", "removal", "the weights", level=1, needs_data=True)


def test_a_schemes_card_becomes_json_with_every_field() -> None:
    again = json.loads(json.dumps(CARD.as_dict()))
    assert again.keys() == {field.name for field in fields(Card)}
    assert again["function"] == ["ownership", "identity"]


def test_an_attacks_card_becomes_json_with_every_field() -> None:
    again = json.loads(json.dumps(ATTACK.as_dict()))
    assert again.keys() == {field.name for field in fields(AttackCard)}
    assert again["copies"] == 1
