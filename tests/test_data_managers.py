"""Managers: every answer derived again from the row's text, and all of it slept on before anything is asked."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_sleep.data import Managers
from hf_sleep.data.khop import is_held_out
from hf_sleep.data.managers import LIKED, NAMES

COMMON = settings(
    max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
FEW = NAMES[::5]


def byte_level(vocab_size, names):
    """Byte-level BPE, as most models have it, that knows `names` as one token each."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = [
        f" The manager of the manager of {name} is {name}. {name} likes {thing}." for name in names for thing in LIKED
    ]
    special = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<s>", "</s>"]}
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, **special))
    return bpe


def fast(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return fast(byte_level(1500, NAMES))


@pytest.fixture(scope="module")
def beginning_tokenizer():
    """A BOS token before every text, and few of the names as one token."""
    bpe = byte_level(700, FEW)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return fast(bpe)


def parts(row):
    """The tokens of each slept window, and those of the questions."""
    assert len(row["sleep_after"]) == len(row["input_ids"]) == len(row["labels"])
    ends = [i + 1 for i, sleeps in enumerate(row["sleep_after"]) if sleeps]
    cuts = [0, *ends, len(row["input_ids"])]
    return [row["input_ids"][a:b] for a, b in pairwise(cuts)]


def solve(tokenizer, row):
    """Names that answer the questions, hop counts and the people's managers, from the text alone."""
    *windows, questions = (tokenizer.decode(part) for part in parts(row))
    manager = {}
    for window in windows:
        sentences = re.findall(r" ([^.]+)\.", window.removeprefix("<s>"))
        assert "".join(f" {sentence}." for sentence in sentences) == window.removeprefix("<s>")
        for sentence in sentences:
            if match := re.fullmatch(r"The manager of (\w+) is (\w+)", sentence):
                assert match[1] not in manager
                manager[match[1]] = match[2]
            else:
                assert re.fullmatch(r"(\w+) likes (\w+)", sentence)
    answers, hops, asked = [], [], []
    for line in questions.splitlines():
        managers, name = re.fullmatch(r" The manager of((?: the manager of)*) (\w+) is", line).groups()
        asked.append(name)
        hops.append(1 + managers.count("the manager"))
        for _ in range(hops[-1]):
            name = manager[name]
        answers.append(name)
    assert len(set(asked)) == len(asked)
    return answers, hops, manager


@given(
    people=st.integers(5, 12),
    hops=st.sampled_from([(1, 2, 3, 4), (2,), (1, 3)]),
    windows=st.integers(1, 5),
    questions=st.integers(1, 5),
    window_size=st.integers(110, 160),
    split=st.sampled_from(["train", "test"]),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_answers_follow_from_the_text(tokenizer, people, hops, windows, questions, window_size, split, seed):
    task = Managers(tokenizer, people, hops, windows, questions, window_size)
    row = task.example(seed, split)
    answers, asked, manager = solve(tokenizer, row)
    assert (row["answer"], row["hops"], row["difficulty"]) == (answers, asked, max(asked))
    assert len(answers) == questions
    assert len(manager) == people
    name = first = next(iter(manager))
    for step in range(1, people + 1):
        name = manager[name]
        assert (name == first) == (step == people)
    assert set(asked) <= set(hops)
    assert is_held_out([NAMES.index(manager[n]) if n in manager else -1 for n in NAMES]) == (split == "test")
    said = [label for label in row["labels"] if label != -100]
    assert [tokenizer.decode(label) for label in said] == [f" {name}" for name in answers]
    ends = {token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100}
    assert tokenizer.decode(list(ends)) == "\n"
    assert len(row["input_ids"]) <= task.length


def test_all_is_slept_on_before_anything_is_asked(tokenizer):
    task = Managers(tokenizer, people=7, windows=3, questions=3)
    spread = Counter()
    for row in task.rows(0, "train", range(50)):
        *windows, questions = parts(row)
        assert len(windows) == 3
        assert all(task.window_size - 8 < len(window) <= task.window_size for window in windows)
        assert len(questions) <= task.window_size
        assert set(row["labels"][: -len(questions)]) == {-100}
        spread[tuple(tokenizer.decode(window).count("manager") for window in windows)] += 1
    assert spread == {(2, 2, 3): 50}


def test_a_tokenizer_with_a_beginning_and_few_names(beginning_tokenizer):
    task = Managers(beginning_tokenizer, people=5, windows=2, questions=2)
    for row in task.rows(0, "train", range(20)):
        assert row["input_ids"].count(beginning_tokenizer.bos_token_id) == 1
        assert row["input_ids"][0] == beginning_tokenizer.bos_token_id
        answers, _, manager = solve(beginning_tokenizer, row)
        assert row["answer"] == answers
        assert set(manager) <= set(FEW)
        assert all(len(window) <= task.window_size for window in parts(row))


def test_rows(tokenizer):
    task = Managers(tokenizer)
    rows = task.rows(3, "train", range(5))
    assert list(task.dataset(5, 3)) == list(task.stream(3).take(5)) == rows
    assert task.rows(3, "test", range(5)) != rows
    text = [[tokenizer.decode(row["input_ids"]), row["hops"], row["answer"]] for row in rows]
    assert hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16] == "fec736c4c1fa93ba"
    perfect = [*rows[0]["labels"][1:], 0]
    assert task.score(perfect, rows[0]) == [(k, True) for k in rows[0]["hops"]]
    last = max(i for i, label in enumerate(rows[0]["labels"]) if label != -100)
    perfect[last - 1] += 1
    assert [right for _, right in task.score(perfect, rows[0])] == [True, True, True, False]
    assert task.difficulties == (1, 2, 3, 4)
    assert task.vocab_size == len(tokenizer)


def test_chance_is_what_a_guess_among_the_people_scores(tokenizer):
    task, guesser = Managers(tokenizer, people=6, questions=4), random.Random(0)
    right, asked = Counter(), Counter()
    for row in task.rows(0, "test", range(1_000)):
        *_, manager = solve(tokenizer, row)
        questions = tokenizer.decode(parts(row)[-1]).splitlines()
        for k, name, question in zip(row["hops"], row["answer"], questions, strict=True):
            asked[k] += 1
            right[k] += name == guesser.choice([other for other in manager if f" {other} " not in question])
    for k in task.difficulties:
        assert task.chance(k) == 1 / 5
        assert right[k] / asked[k] == pytest.approx(1 / 5, abs=0.05)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"people": 4}, "people=4 cannot work: it must be an integer from 5 to"),
        ({"hops": (1, 8)}, r"hops=\(1, 8\) cannot work: .* from 1 to 7, ascending"),
        ({"hops": [1, 2]}, r"hops=\[1, 2\]"),
        ({"windows": 9}, "windows=9 cannot work: it must be an integer from 1 to 8"),
        ({"questions": 0}, "questions=0"),
        ({"window_size": 20}, r"window_size=20 cannot work: it must be at least \d+, for facts and questions"),
    ],
)
def test_mistakes_are_named(tokenizer, fields, message):
    with pytest.raises(ValueError, match=f"Managers.{message}"):
        Managers(tokenizer, **fields)


def test_a_tokenizer_that_knows_too_few_names_is_refused(beginning_tokenizer):
    with pytest.raises(ValueError, match=r"people=60 cannot work: \d+ of the names are one token of this tokenizer"):
        Managers(beginning_tokenizer, people=60, window_size=500)
