"""Languages without lists, short and mixed prompts: nothing may differ but typography, courtesy and the full stop."""

# ruff: noqa: RUF001 - prompts in many scripts

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.cache.near.guard import Rule
from tests.near.asking import OTHER, Asking

REPEATS = [
    ("Wie spät ist es in Berlin", "Wie spät ist es in Berlin?"),
    ("Hallo, wie spät ist es in Berlin?", "wie spät ist es in Berlin?"),
    ("Wie spät ist es in Berlin? Danke!", "Wie spät ist es in Berlin?"),
    ("Bonjour, où est la gare de Lyon ?", "où est la gare de Lyon ?"),
    ("Où est la gare de Lyon ? Merci !", "Où est la gare de Lyon ?"),
    ("Где находится Москва? Спасибо!", "Где находится Москва?"),
    ("你好，上海有什么特产？", "上海有什么特产？"),
    ("请问上海有什么特产？", "上海有什么特产？"),
    ("上海有什么特产？谢谢", "上海有什么特产？"),
    ("上海有什么特产?", "上海有什么特产？"),
    ("東京の天気は？ありがとうございます", "東京の天気は？"),
    ("Cancel it.", "Cancel it"),
]
OTHER_QUESTIONS = [
    ("Sie ist da?", "sie ist da?"),
    ("Wann kommt der Zug an in Berlin", "Wann kommt der Zug in Berlin"),
    ("Wie komme ich zu dem Haus?", "Wie komme ich zu Haus?"),
    ("Er kommt heute nicht?", "Er kommt heute?"),
    ("Wie schön ist das Wetter?", "Wie schon ist das Wetter?"),
    ("Où est la gare de Lyon ?", "Où est la gare de Dijon ?"),
    ("Il a payé la note ?", "Il a paye la note ?"),
    ("Sınır nerede kalıyor?", "Sinir nerede kalıyor?"),
    ("می‌خواهم", "میخواهم"),
    ("क्\u200dष क्या है?", "क्ष क्या है?"),
    ("上海有什么特产？", "海上有什么特产？"),
    ("东京的人口是多少？", "北京的人口是多少？"),
    ("我要买鸡蛋吗？", "我不要买鸡蛋吗？"),
    ("请客吃饭有什么讲究？", "客吃饭有什么讲究？"),
    ("ありがとうは英語で何ですか？", "は英語で何ですか？"),
    ("犬が猫を追いますか？", "猫が犬を追いますか？"),
    ("เสื้อตัวนี้ราคาเท่าไร", "เสือตัวนี้ราคาเท่าไร"),
    ("Bonjour", "Merci"),
    ("你好", "谢谢"),
    ("Cancel it", "Cancel them"),
    ("10²", "102"),
]
LETTERS = "abcdefgäéñßıжщ海上0123456789"


@pytest.mark.parametrize(("a", "b"), REPEATS)
def test_courtesy_and_final_punctuation_may_differ(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).rule is Rule.EQUAL
    assert asking.is_hit(a, b)
    assert asking.is_hit(b, a)


@pytest.mark.parametrize(("a", "b"), OTHER_QUESTIONS)
def test_nothing_else_may(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).rule is Rule.STRICT
    assert asking.verdict(b, a).rule is Rule.STRICT
    assert not asking.verdict(a, b).same


@pytest.mark.parametrize(("a", "b"), [("Es regnet.", "Es regnet?"), ("下雨了。", "下雨了？"), ("Is it?", "Is it.")])
def test_a_question_is_no_statement(asking: Asking, a: str, b: str) -> None:
    assert asking.verdict(a, b).rule is Rule.STATEMENT
    assert not asking.verdict(b, a).same


@settings(deadline=None, max_examples=300)
@given(text=st.sampled_from(OTHER), data=st.data())
def test_no_letter_may_differ(asking: Asking, text: str, data: st.DataObject) -> None:
    at = data.draw(st.sampled_from([at for at, char in enumerate(text) if char.isalnum()]))
    letter = data.draw(st.sampled_from([letter for letter in LETTERS if letter != text[at]]))
    other = text[:at] + letter + text[at + 1 :]
    assert not asking.verdict(other, text).same
    assert not asking.verdict(text, other).same


@settings(deadline=None, max_examples=200)
@given(text=st.sampled_from(OTHER), data=st.data())
def test_no_letter_may_be_left_out(asking: Asking, text: str, data: st.DataObject) -> None:
    at = data.draw(st.sampled_from([at for at, char in enumerate(text) if char.isalnum()]))
    other = text[:at] + text[at + 1 :]
    assert not asking.verdict(other, text).same
    assert not asking.verdict(text, other).same
