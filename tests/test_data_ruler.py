"""RULER's tasks: every answer derived again from the text alone, and all text slept on before it is asked for."""

import hashlib
import json
import random
import re
from collections import Counter
from itertools import pairwise, product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_sleep.data import RULER, CommonWords, FrequentWords, Needle, VariableTracking
from hf_sleep.data.haystack import NOISE, cut, draw_sentence
from hf_sleep.data.word_counts import FIRST, SECOND, WORDS

COMMON = settings(
    max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
BOOK = """
Mr. Bo had a boat. It was old, "and slow!" as he said.
He sold it (for 3.50). Who bought it? Nobody knows.

A second chapter

Rain fell on the harbour for days. The boat was gone.
"""


def byte_level(vocab_size):
    """Byte-level BPE, as most models have it, that has seen sentences and words like those of the tasks."""
    rng = random.Random(0)
    corpus = [draw_sentence(rng) for _ in range(500)] + [f" {word}" for word in WORDS[::7]]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "special_tokens": ["<s>", "</s>"]}
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=vocab_size, **special))
    return bpe


def fast(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return fast(byte_level(4000))


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """A token for each byte, and BOS before every text."""
    bpe = byte_level(258)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return fast(bpe)


def parts(tokenizer, row, task):
    """Windows, question and answer in words."""
    ids, labels = row["input_ids"], row["labels"]
    assert len(row["sleep_after"]) == len(ids) == len(labels) <= task.length
    ends = [i + 1 for i, sleeps in enumerate(row["sleep_after"]) if sleeps]
    assert len(ends) == task.windows
    assert all(b - a <= task.window_size for a, b in pairwise([0, *ends, len(ids)]))
    begin = next(i for i, label in enumerate(labels) if label != -100)
    assert labels == [-100] * begin + ids[begin:]
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) - begin <= task.new_tokens
    start = tokenizer("")["input_ids"]
    assert ids[: len(start)] == start
    windows = [tokenizer.decode(ids[max(a, len(start)) : b]) for a, b in pairwise([0, *ends])]
    return windows, tokenizer.decode(ids[ends[-1] : begin]), tokenizer.decode(ids[begin:-1])


def sentences(windows):
    """Sentences of each window, none of them broken."""
    found = [re.findall(r" ?[A-Z].*?\.(?= [A-Z]|$)", window) for window in windows]
    assert list(map("".join, found)) == windows
    return [[sentence.strip() for sentence in window] for window in found]


def solve_needle(windows, question):
    """The values asked for, key by key, the windows since the earliest of them, and all that needles told."""
    needles = [re.findall(r" A secret (?:number|code) of (\S+) is (\S+)\.", window) for window in windows]
    told = [(key, value, len(windows) - w) for w, window in enumerate(needles) for key, value in window]
    [whose] = re.findall(r"\nQuestion: What (?:is the|are all) secret \w+ of (.+)\?\n", question)
    asked = [found for key in re.split(", | and ", whose) for found in told if found[0] == key]
    return [value for _, value, _ in asked], max(ago for *_, ago in asked), told


def solve_variables(windows, question):
    """All variables that hold the number asked about, and how many variables hold each number."""
    values = {}
    for name, source in re.findall(r" Let ([A-Z]{5}) = (\w+)\.", "".join(windows)):
        assert name not in values
        values[name] = source if source.isdigit() else values[source]
    [number] = re.findall(r"\nQuestion: Which variables hold (\d{5}),", question)
    return [name for name, value in values.items() if value == number], Counter(values.values())


def count_words(windows):
    opening, text = re.fullmatch(r"(.+?\..+?\.(?: Remember[^.]+\.)?)((?: [a-z]+| \.\.\.)+)", "".join(windows)).groups()
    assert "Remember" in opening
    return Counter(text.split())


@given(
    haystack=st.sampled_from(["sentences", "noise", "needles", BOOK]),
    keys=st.integers(1, 4),
    values=st.integers(1, 3),
    share=st.floats(0, 1),
    kinds=st.sampled_from([("words", "numbers"), ("words", "uuids"), ("uuids", "uuids")]),
    windows=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_needles_follow_from_the_text(tokenizer, haystack, keys, values, share, kinds, windows, seed):
    queries = 1 + int(share * (keys - 1))
    task = Needle(tokenizer, windows, 1_300 if "uuids" in kinds else 400, haystack, keys, values, queries, *kinds)
    row = task.example(seed, "test")
    text, question, answer = parts(tokenizer, row, task)
    found, ago, told = solve_needle(text, question)
    assert (row["references"], row["answer"], row["difficulty"]) == (found, found, ago)
    assert answer == f" {', '.join(found)}"
    assert len(found) == queries * values
    assert sum(value in found for _, value, _ in told) == len(set(found))
    assert ("s of" in question) == (queries * values > 1)
    if haystack == "needles":
        assert len(told) + 2 == sum(map(len, sentences(text)))  # two of the opening
    else:
        assert len(told) == keys * values
        assert sorted(Counter(key for key, *_ in told).values()) == [values] * keys
    for value in found:
        assert re.fullmatch(r"[1-9]\d{6}" if kinds[1] == "numbers" else r"[0-9a-f-]{36}", value)


@given(
    haystack=st.sampled_from(["sentences", "noise", BOOK]),
    chains=st.integers(1, 4),
    hops=st.integers(1, 6),
    windows=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_variables_follow_from_the_text(tokenizer, haystack, chains, hops, windows, seed):
    task = VariableTracking(tokenizer, windows, 500, haystack, chains, hops)
    row = task.example(seed)
    text, question, answer = parts(tokenizer, row, task)
    names, lengths = solve_variables(text, question)
    assert row["references"] == row["answer"] == names
    assert row["difficulty"] == hops == len(names) - 1
    assert answer == f" {', '.join(names)}"
    assert question.endswith(f"The {hops + 1} variables that hold {question.split()[4][:-1]} are")
    assert list(lengths.values()) == [hops + 1] * chains


@given(
    common=st.integers(1, 10),
    common_times=st.integers(4, 8),
    rare_times=st.integers(1, 3),
    windows=st.integers(1, 4),
    window_size=st.integers(700, 1_000),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_common_words_follow_from_the_text(tokenizer, common, common_times, rare_times, windows, window_size, seed):
    task = CommonWords(tokenizer, windows, window_size, common, common_times, rare_times)
    row = task.example(seed)
    text, _, answer = parts(tokenizer, row, task)
    times = count_words(text)
    most = [word for word, _ in times.most_common(common)]
    assert row["references"] == row["answer"] == most
    assert answer == f" {', '.join(most)}"
    assert row["difficulty"] == windows
    assert set(times) <= set(WORDS)
    assert {times.pop(word) for word in most} == {common_times}
    assert max(times.values()) <= rare_times
    few = sum(n < rare_times for n in times.values())
    assert few <= 2 * (windows + rare_times)


@given(
    alpha=st.sampled_from([1.3, 2.0, 3.0]),
    letters=st.integers(3, 7),
    windows=st.integers(1, 4),
    window_size=st.integers(1_300, 1_600),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_frequent_words_follow_from_the_text(tokenizer, alpha, letters, windows, window_size, seed):
    task = FrequentWords(tokenizer, windows, window_size, alpha, letters)
    row = task.example(seed)
    text, _, answer = parts(tokenizer, row, task)
    times = count_words(text)
    dots = times.pop("...")
    ranks = times.most_common()
    most = [word for word, _ in ranks[:3]]
    assert row["references"] == row["answer"] == most
    assert answer == f" {', '.join(most)}"
    assert row["difficulty"] == windows
    assert {len(word) for word in times} == {letters}
    assert ranks[0][1] > ranks[1][1] > ranks[2][1] > ranks[3][1]
    for rank, (_, n) in enumerate(ranks, 2):
        n_most = (ranks[0][1] + 1) * 2**alpha
        assert (ranks[0][1] * 2**alpha) * rank**-alpha - 1 < n <= n_most * rank**-alpha
    assert dots >= ranks[0][1] * 2**alpha - 1


@pytest.mark.parametrize("name", RULER)
def test_windows_are_full_of_whole_sentences(tokenizer, name):
    cls, fields = RULER[name]
    task = cls(tokenizer, windows=2, window_size=900, **fields)
    longest = 110 if "uuids" in fields.values() else 30
    for row in task.rows(3, "train", range(3)):
        windows, *_ = parts(tokenizer, row, task)
        ends = [i + 1 for i, sleeps in enumerate(row["sleep_after"]) if sleeps]
        assert all(900 - longest < b - a for a, b in pairwise([0, *ends]))
        assert row["difficulty"] in task.difficulties
        if cls in (Needle, VariableTracking):
            assert min(map(len, sentences(windows))) > 5


@pytest.mark.parametrize("name", ["niah_single_1", "vt", "cwe", "fwe"])
def test_a_row_is_drawn_from_its_seed_and_number(tokenizer, name):
    cls, fields = RULER[name]
    fields = {"common": 2, "common_times": 4, "rare_times": 1} if name == "cwe" else fields
    task = cls(tokenizer, windows=2, window_size=200, **fields)
    rows = task.rows(3, "train", range(4))
    assert cls(tokenizer, windows=2, window_size=200, **fields).rows(3, "train", range(2, 4)) == rows[2:]
    assert list(task.dataset(4, 3)) == list(task.stream(3).take(4)) == rows
    assert task.rows(3, "test", range(4)) != rows
    assert task.rows(4, "train", range(4)) != rows


def test_rows_stay_what_they_were(tokenizer):
    rows = [cls(tokenizer, 2, 900, **fields).rows(0, "test", range(1))[0] for cls, fields in RULER.values()]
    text = [[tokenizer.decode(row["input_ids"]), row["answer"], row["difficulty"]] for row in rows]
    assert hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16] == "f32c94d7ba305b8a"


def test_settings_are_those_of_ruler(tokenizer):
    tasks = {name: cls(tokenizer, 2, 1_500, **fields) for name, (cls, fields) in RULER.items()}
    counts = {name: (task.keys, task.values, task.queries) for name, task in tasks.items() if "niah" in name}
    assert counts == {
        **{f"niah_single_{i}": (1, 1, 1) for i in (1, 2, 3)},
        "niah_multikey_1": (4, 1, 1),
        **{f"niah_multikey_{i}": (1, 1, 1) for i in (2, 3)},
        "niah_multivalue": (1, 4, 1),
        "niah_multiquery": (4, 1, 4),
    }
    assert (tasks["vt"].chains, tasks["vt"].hops) == (1, 4)
    assert tasks["cwe"].common == 10
    assert (tasks["fwe"].alpha, tasks["fwe"].letters) == (2.0, 6)
    generated = {name: task.new_tokens for name, task in tasks.items()}
    assert generated == {**dict.fromkeys(counts, 128), "vt": 35, "cwe": 120, "fwe": 50}


@pytest.mark.parametrize("name", RULER)
def test_the_least_window_is_enough(tokenizer, bytes_tokenizer, name):
    cls, fields = RULER[name]
    if cls is CommonWords:
        fields = {"common": 3, "common_times": 5, "rare_times": 1}
    for known in (tokenizer, bytes_tokenizer):
        for windows in (1, 4):
            window_size = 1
            while True:
                try:
                    task = cls(known, windows, window_size, **fields)
                except ValueError as error:
                    if least := re.search("at least (\\d+), for", str(error)):
                        assert int(least[1]) > window_size
                        window_size = int(least[1])
                    else:
                        window_size += 1
                else:
                    break
            for row in task.rows(0, "train", range(10)):
                parts(known, row, task)


def test_answers_of_many_tokens_can_be_said_whole(bytes_tokenizer):
    assert VariableTracking(bytes_tokenizer).new_tokens == len(" ABCDE, ABCDE, ABCDE, ABCDE, ABCDE") + 1
    assert VariableTracking(bytes_tokenizer, hops=1).new_tokens == 30
    many = Needle(bytes_tokenizer, 2, 1_000, values=4, value_kind="uuids")
    assert many.new_tokens == 4 * (36 + 2)
    assert FrequentWords(bytes_tokenizer, 2, 1_000, letters=20).new_tokens == 3 * 22 + 1
    assert CommonWords(bytes_tokenizer, 4, 2_000, 20, 10).new_tokens == 20 * 10 + 1


def test_needles_stand_at_every_distance_equally_often(tokenizer):
    task = Needle(tokenizer, 4, 200, "noise", keys=4, queries=3)
    seen, distracting = Counter(), Counter()
    for row in task.rows(0, "train", range(400)):
        windows, question, _ = parts(tokenizer, row, task)
        values, ago, told = solve_needle(windows, question)
        seen[ago] += 1
        distracting.update(n for _, value, n in told if value not in values)
    assert task.difficulties == (1, 2, 3, 4)
    assert all(70 < n < 130 for n in seen.values())
    assert all(70 < distracting[n] < 130 for n in task.difficulties)


def test_a_text_is_read_in_order_from_anywhere(tokenizer):
    told = [s.strip() for s in cut(BOOK)]
    assert told == [
        *(
            "Mr.",
            "Bo had a boat.",
            'It was old, "and slow!"',
            "as he said.",
            "He sold it (for 3.50).",
            "Who bought it?",
        ),
        *("Nobody knows.", "A second chapter", "Rain fell on the harbour for days.", "The boat was gone."),
    ]
    task, firsts = Needle(tokenizer, 3, 150, BOOK), set()
    for row in task.rows(0, "train", range(30)):
        windows, _, _ = parts(tokenizer, row, task)
        windows = [re.sub(r" A secret number of \S+ is \d+\.", "", window) for window in windows]
        assert all(window.endswith(tuple(f" {s}" for s in told)) for window in windows)
        text = "".join(windows).removeprefix(task._opening)
        first = next(i for i, s in enumerate(told) if text.startswith(f" {s} {told[(i + 1) % len(told)]}"))
        circle = " ".join([*told[first:], *told * 20])
        assert circle.startswith(text[1:])
        firsts.add(first)
    assert len(firsts) > 5


def test_noise_repeats_and_sentences_do_not(tokenizer):
    row = VariableTracking(tokenizer, 2, 400, "noise").example(0)
    text = tokenizer.decode(row["input_ids"])
    assert all(text.count(sentence) > 4 for sentence in NOISE)
    row = VariableTracking(tokenizer, 2, 400, "sentences").example(0)
    said = sentences(parts(tokenizer, row, VariableTracking(tokenizer, 2, 400))[0])
    said = [sentence for window in said for sentence in window]
    assert len(set(said)) == len(said) > 20


@pytest.mark.parametrize(
    ("windows", "fields", "times"),
    [
        (1, {}, (6, 1)),
        (4, {}, (30, 3)),
        (60, {}, (120, 12)),
        (1, {"rare_times": 2}, (6, 2)),
        (4, {"rare_times": 2}, (30, 2)),
        (4, {"common_times": 9}, (9, 3)),
    ],
)
def test_common_words_come_as_often_as_suits_the_length(tokenizer, windows, fields, times):
    task = CommonWords(tokenizer, windows, 1_000, **fields)
    row = task.example(0)
    counts = count_words(parts(tokenizer, row, task)[0])
    assert {counts.pop(word) for word in row["answer"]} == {times[0]}
    assert Counter(counts.values()).most_common(1)[0][0] == max(counts.values()) == times[1]


def test_no_word_stands_in_another_one():
    assert {len(part) for part in (*FIRST, *SECOND)} == {4}
    assert len(set(FIRST)) == len(FIRST)
    assert len(set(SECOND)) == len(SECOND)
    assert not set(FIRST) & set(SECOND)


def test_judging_says_which_references_were_said(tokenizer):
    task, row = Needle(tokenizer), {"references": ["1234567", "7654321", "ab12"]}
    assert task.judge(" 1234567, 7654321 and AB12.", row) == [True, True, True]
    assert task.judge("perhaps 97654321?", row) == [False, True, False]
    assert task.judge("123456 7654320", row) == [False, False, False]


def test_chance_of_common_words_is_what_the_shortest_of_the_list_score(tokenizer):
    task = CommonWords(tokenizer, 2, 250, 10, 5, 1)
    shortest = sorted(task._words, key=lambda word: len(tokenizer(word)["input_ids"]))
    said = tokenizer.decode([token for word in shortest for token in tokenizer(word)["input_ids"]][: task.new_tokens])
    right = [is_said for row in task.rows(0, "test", range(200)) for is_said in task.judge(said, row)]
    assert sum(right) / len(right) == pytest.approx(task.chance(2), rel=0.25)
    assert 0.02 < task.chance(2) < 0.08


def test_chance_of_drawn_words_is_what_many_words_score(tokenizer):
    task, guesser = FrequentWords(tokenizer, 2, 300, letters=3), random.Random(0)
    words = list(map("".join, product("abcdefghijklmnopqrstuvwxyz", repeat=3)))
    rows = task.rows(0, "test", range(40)) * 250
    right = [said for row in rows for said in task.judge(" ".join(guesser.sample(words, task.new_tokens)), row)]
    assert sum(right) / len(right) == pytest.approx(task.chance(2), rel=0.25)


def test_chance_of_numbers_and_names_is_next_to_nothing(tokenizer):
    digits = "".join(random.Random(0).choices("0123456789", k=128))
    numbers = {found for i in range(122) if (found := digits[i : i + 7])[0] != "0"}
    assert 0.85 * Needle(tokenizer).chance(1) < len(numbers) / 9_000_000 <= Needle(tokenizer).chance(1)
    assert Needle(tokenizer, value_kind="uuids").chance(1) < 1e-30
    assert VariableTracking(tokenizer).chance(4) == VariableTracking(tokenizer).new_tokens / 26**5


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (Needle, {"windows": 0}, "windows=0 cannot work: it must be an integer of at least 1"),
        (Needle, {"window_size": 30}, r"window_size=30 cannot work: it must be at least \d+, for its needles"),
        (Needle, {"haystack": "hay"}, "haystack='hay' cannot work: it must be one of .*, or a text of at least two"),
        (Needle, {"haystack": 3}, "haystack=3"),
        (
            Needle,
            {"haystack": "A word. " + "a word " * 600},
            r"window_size=512 .* \d+, for the longest sentence",
        ),
        (VariableTracking, {"haystack": "needles"}, "haystack='needles'"),
        (Needle, {"keys": 0}, "keys=0"),
        (Needle, {"values": 0}, "values=0"),
        (Needle, {"values": 40}, r"window_size=512 cannot work: it must be at least \d+, for its needles"),
        (Needle, {"queries": 2}, "queries=2 cannot work: it must be an integer from 1 to 1"),
        (Needle, {"key_kind": "numbers"}, "key_kind='numbers'"),
        (Needle, {"value_kind": "words"}, "value_kind='words'"),
        (VariableTracking, {"chains": 0}, "chains=0"),
        (VariableTracking, {"hops": 0}, "hops=0"),
        (VariableTracking, {"hops": 90}, r"window_size=512 cannot work: it must be at least \d+, for its question"),
        (
            VariableTracking,
            {"chains": 90},
            r"window_size=512 cannot work: it must be at least \d+, for its assign",
        ),
        (CommonWords, {"common": 0}, "common=0"),
        (CommonWords, {"rare_times": 0}, "rare_times=0"),
        (CommonWords, {"rare_times": 6, "windows": 1}, "rare_times=6 cannot work: it must be below .*, which are 6"),
        (CommonWords, {"windows": 1, "window_size": 120}, "common_times=None cannot work: 2 of each word fit in the"),
        (CommonWords, {"common_times": 3}, "common_times=3 cannot work: it must be an integer of at least 4"),
        (CommonWords, {"common_times": 90}, r"common_times=90 cannot work: \d+ of each word fit in the windows"),
        (
            CommonWords,
            {"windows": 90, "rare_times": 2},
            r"rare_times=2 .* \d+ words are known, too few: it must be \d+",
        ),
        (CommonWords, {"windows": 90, "rare_times": 1, "common_times": 2}, "rare_times=1 .* must be more, with larger"),
        (FrequentWords, {"alpha": 1}, "alpha=1 cannot work: it must be a number above 1, at most 10"),
        (FrequentWords, {"letters": 2}, "letters=2"),
        (FrequentWords, {"alpha": 9.0}, r"window_size=512 cannot work: it must be at least \d+, for the frequencies"),
    ],
)
def test_mistakes_are_named(tokenizer, cls, fields, message):
    with pytest.raises(ValueError, match=f"{cls.__name__}.{message}"):
        cls(tokenizer, **fields)
