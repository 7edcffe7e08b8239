"""GSM-Infinite: every answer re-derived from the text alone, and nothing but the text tells it."""

import hashlib
import random
import re
import time
from collections import Counter
from itertools import islice, pairwise
from statistics import correlation, mean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_sleep.data import GSMInfinite
from hf_sleep.data.gsm_infinite import MODES, NOISES, TEMPLATES, majority

COMMON = settings(
    max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
PARTS = {"young", "teachers", "nominations"}
LARGEST = 99


class Text:
    """Reads what a prompt says: knows the grammar, and nothing of the generator."""

    def __init__(self, prompt):
        lines = prompt.split("\n")
        assert lines.pop() == "Answer:"
        question = next(line for line in lines if line.startswith("Question: "))
        lines.remove(question)
        self.asked = re.fullmatch(r"Question: What is the (.+)\?", question)[1]
        self.said = re.findall(r"([A-Z][^.]*)\.(?: |$)", lines[0])
        assert ". ".join(self.said) + "." == lines[0]
        self.rules, self.stated, self.unknown, self.subjects = {}, {}, None, []
        for sentence in self.said:
            if match := re.fullmatch(r"The (.+) is still unknown", sentence):
                assert self.unknown is None
                self.unknown = match[1]
            elif match := re.fullmatch(r"It turns out that the (.+) is (\d+)", sentence):
                assert not self.stated
                self.stated = {match[1]: int(match[2])}
            else:
                subject, text = re.fullmatch(r"The (.+) equals (.+)", sentence).groups()
                assert subject not in self.rules
                assert not subject.startswith("total")
                self.rules[subject] = self._expression(text)
            self.subjects.append(match[1] if match else subject)
        named = set(self.rules) | {self.unknown} | {item for *_, items in self.rules.values() for item in items}
        counts = sorted(item for item in named - {None} if item.startswith("number"))
        for total in {*named, self.asked, *self.stated} - {None}:
            if match := re.fullmatch(r"total number of (\w+) (in|at) (.+)", total):
                what, at, place = match.groups()
                kinds = [m[1] for c in counts if (m := re.fullmatch(rf"number of (.+)s {at} {place}", c))]
                assert kinds
                if what in PARTS:
                    pairs = [(f"number of {k}s", f"average number of {what} per {k}") for k in kinds]
                    self.rules[total] = (None, None, "weighted", [f"{a} {at} {place}" for p in pairs for a in p])
                else:
                    self.rules[total] = (None, None, "sum", [f"number of {k}s {at} {place}" for k in kinds])

    @staticmethod
    def _expression(text):
        constant = prefix = None
        if match := re.fullmatch(r"(\d) (plus|times) (.+)", text):
            constant, prefix, text = int(match[1]), match[2], match[3]
            assert (2 if prefix == "times" else 1) <= constant <= 4
        if text in ("1", "2", "3", "4"):
            assert prefix is None
            return int(text), None, "constant", []
        if match := re.fullmatch(r"the (difference between|sum of) the (.+)", text):
            items = re.split(r", and the |, the | and the ", match[2])
            form = match[1].split()[0]
            assert len(items) == len(set(items))
            assert len(items) == 2 if form == "difference" else len(items) in (2, 3)
            return constant, prefix, form, items
        return constant, prefix, "sum", [re.fullmatch("the (.+)", text)[1]]

    def values(self, unknown=None, items=None):
        """Work out `items` and all that they are made of; by default everything."""
        known = {} if unknown is None else {self.unknown: unknown}

        def value(item, above):
            assert item not in above, "a circle"
            if item not in known:
                constant, prefix, form, items = self.rules[item]
                inner = [value(each, {*above, item}) for each in items]
                if form == "weighted":
                    result = sum(a * b for a, b in zip(inner[::2], inner[1::2], strict=True))
                elif form == "difference":
                    result = inner[0] - inner[1]
                    assert result > 0 or (unknown or 0) > 4
                else:
                    result = sum(inner)
                if prefix is None:
                    result += constant or 0
                else:
                    result = constant + result if prefix == "plus" else constant * result
                known[item] = result
            return known[item]

        for item in self.rules if items is None else items:
            value(item, set())
        return known

    def under(self, top):
        """`top` and all that it is made of."""
        found, queue = set(), [top]
        while queue:
            item = queue.pop()
            if item not in found:
                found.add(item)
                queue += [] if item == self.unknown else self.rules[item][3]
        return found

    @property
    def top(self):
        return self.asked if self.unknown is None else next(iter(self.stated))

    def answer(self):
        if self.unknown is None:
            return self.values(items=[self.asked])[self.asked]
        assert self.asked == self.unknown
        (stated,) = self.stated.values()
        fitting = [x for x in range(1, LARGEST + 1) if self.values(x, [self.top])[self.top] == stated]
        assert len(fitting) == 1, fitting
        return fitting[0]

    def op(self):
        rules = [self.rules[item] for item in self.under(self.top) - {self.unknown}]
        return sum(len(items) + (constant is not None) for constant, _, _, items in rules) + (self.unknown is not None)

    def depth(self):
        found = {}

        def deep(item):
            if item not in found:
                below = [] if item == self.unknown else self.rules[item][3]
                found[item] = 1 + max(map(deep, below), default=0)
            return found[item]

        return deep(self.top)


def place_of(quantity):
    return re.search(r" (?:in|at) (.+)$", quantity)[1]


def solved(problem):
    """Check all that one problem claims against its text."""
    text = Text(problem.prompt)
    assert text.said == [sentence[:-1] for sentence in problem.sentences]
    assert problem.answer == text.answer()
    assert problem.op == text.op()
    assert problem.depth == text.depth() <= problem.op
    assert problem.mode == ("forward" if text.unknown is None else "reverse")
    core = text.under(text.top)
    assert list(problem.needed) == [subject in core for subject in text.subjects]
    everything = text.values(problem.answer if text.unknown else None)
    assert all(1 <= value <= LARGEST for value in everything.values())
    if text.unknown is not None:
        assert 1 <= problem.answer <= 4
        steps = [text.values(x)[text.top] for x in range(1, 5)]
        assert all(a < b for a, b in pairwise(steps))
    tried = [text.values(x) for x in range(1, 5)] if text.unknown else [everything]
    trace = [re.fullmatch(r"The (.+?) = .+ = ([\d |]+)\.", step).groups() for step in problem.solution]
    assert {item for item, _ in trace} == core
    for item, values in trace:
        assert [int(value) for value in values.split(" | ")] == [each[item] for each in tried]
    kept = [s for s, needed in zip(problem.sentences, problem.needed, strict=True) if needed]
    alone = Text(f"Question: What is the {text.asked}?\n{' '.join(kept)}\nAnswer:")
    assert (alone.answer(), alone.op(), alone.depth()) == (problem.answer, problem.op, problem.depth)
    for subject, needed in zip(text.subjects, problem.needed, strict=True):
        if not needed and text.rules[subject][3]:
            assert text.under(subject) & core
    return text


def fast(tokenizer, **special):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def corpus():
    return [GSMInfinite(tokens=(0, 0)).problem(seed).prompt for seed in range(300)]


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE, as most models have it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        corpus(), trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    )
    return fast(bpe, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def wide_tokenizer():
    """Tokens that span words, and a BOS token before every text."""
    bpe = Tokenizer(models.BPE())
    special = ["<s>", "</s>"]
    bpe.train_from_iterator(corpus()[:60], trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return fast(bpe, bos_token="<s>", eos_token="</s>")


@given(
    ops=st.tuples(st.integers(1, 30), st.integers(1, 30)).map(lambda pair: (min(pair), max(pair))),
    modes=st.sampled_from([("forward",), ("reverse",), MODES]),
    d=st.sampled_from([2, 3]),
    templates=st.sets(st.sampled_from(sorted(TEMPLATES)), min_size=1).map(lambda names: tuple(sorted(names))),
    question_first=st.booleans(),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_every_problem_is_what_its_text_says(ops, modes, d, templates, question_first, seed):
    task = GSMInfinite(ops=ops, modes=modes, d=d, templates=templates, tokens=(0, 0), question_first=question_first)
    problem = task.problem(seed)
    solved(problem)
    assert all(problem.needed)
    assert ops[0] <= problem.op <= ops[1]
    assert problem.mode in modes
    assert problem.template in templates
    assert problem.prompt.startswith("Question: ") == question_first
    assert d == 3 or not re.search("average|total", problem.prompt)


def test_many_large_problems():
    task = GSMInfinite(ops=(8, 30), tokens=(0, 0))
    totals = Counter()
    for seed in range(700):
        text = solved(task.problem(seed))
        totals.update(rule[2] for item, rule in text.rules.items() if item.startswith("total"))
    assert min(totals["sum"], totals["weighted"]) > 50


def test_seeded_problems_never_change():
    task = GSMInfinite(tokens=(0, 0))
    text = "".join(f"{problem.prompt} {problem.answer}" for problem in map(task.problem, range(100)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "b699790b765e5b05"


@given(
    ops=st.sampled_from([(1, 8), (1, 1), (8, 8), (2, 5)]),
    modes=st.sampled_from([("forward",), ("reverse",), MODES]),
    d=st.sampled_from([2, 3]),
    noise=st.sampled_from(NOISES),
    length=st.integers(900, 2500),
    window_size=st.sampled_from([300, 512, 1000]),
    question_first=st.booleans(),
    seed=st.integers(0, 2**32),
)
@COMMON
def test_distractors_change_nothing(tokenizer, ops, modes, d, noise, length, window_size, question_first, seed):
    tokens = (length, length + 400)
    task = GSMInfinite(
        tokenizer, ops, modes, d, noise=noise, tokens=tokens, question_first=question_first, window_size=window_size
    )
    problem = task.problem(seed)
    text = solved(problem)
    size = len(tokenizer(problem.prompt)["input_ids"])
    assert tokens[0] <= size <= tokens[1]
    row = task.encode(problem)
    assert (size - 1) // window_size == (len(row["input_ids"]) - 1) // window_size
    told = [s for s, needed in zip(text.subjects, problem.needed, strict=True) if not needed]
    assert len(told) > 10
    core = text.under(text.top)
    assert any(core & set(text.rules[subject][3]) for subject in told)
    if noise == "disjoint":
        assert not {place_of(item) for item in core} & {place_of(item) for item in told}


@pytest.fixture(scope="module")
def long(tokenizer):
    """Problems of op 1 and of op 8 and of every op, among overlapping distractors, by the same seeds."""
    tasks = {
        ops: GSMInfinite(tokenizer, ops, d=2, noise="overlapping", tokens=(900, 1700), window_size=10**6)
        for ops in [(1, 1), (8, 8), (1, 8)]
    }
    return {ops: [task.problem(seed) for seed in range(160)] for ops, task in tasks.items()}


def test_length_tells_nothing_about_op(tokenizer, long):
    sizes = {ops: [len(tokenizer(each.prompt)["input_ids"]) for each in found] for ops, found in long.items()}
    sentence = max(len(tokenizer(s)["input_ids"]) for found in long.values() for each in found for s in each.sentences)
    assert max(abs(a - b) for a, b in zip(sizes[1, 1], sizes[8, 8], strict=True)) < sentence
    assert abs(mean(sizes[1, 1]) - mean(sizes[8, 8])) < sentence / 20
    assert abs(correlation([each.op for each in long[1, 8]], sizes[1, 8])) < 0.16  # two standard errors
    told = {ops: mean(len(each.sentences) for each in found) for ops, found in long.items()}
    assert told[1, 1] == pytest.approx(told[8, 8], rel=0.05)
    bare = [GSMInfinite(tokens=(0, 0)).problem(seed) for seed in range(100)]
    assert correlation([each.op for each in bare], [len(each.prompt) for each in bare]) > 0.7


def test_order_tells_nothing(long):
    places, steps = [], []
    for problem in long[8, 8]:
        text, last = Text(problem.prompt), len(problem.sentences) - 1
        where = {subject: i for i, subject in enumerate(text.subjects)}
        places += [i / last for i, needed in enumerate(problem.needed) if needed]
        for subject in text.under(text.top) & set(text.rules) & set(where):
            steps += [where[item] < where[subject] for item in text.rules[subject][3] if item != text.unknown]
    assert len(steps) > 500
    assert mean(places) == pytest.approx(0.5, abs=0.02)
    assert mean(steps) == pytest.approx(0.5, abs=0.05)


def test_overlapping_distractors_look_like_the_problem(long):
    same_place, most_named, kinds, shapes = [], [], [], {True: Counter(), False: Counter()}
    for problem in long[1, 8] + long[8, 8]:
        text = Text(problem.prompt)
        core, told = text.under(text.top), set(text.subjects)
        noise = told - core
        same_place += [place_of(item) == place_of(text.asked) for item in noise]
        kinds += [any(item.split(" in ")[0].split(" at ")[0] in other for other in noise) for item in core]
        named = Counter(item for *_, items in text.rules.values() for item in items)
        most_named.append(max(named, key=named.__getitem__) in noise)
        for subject in told & set(text.rules):
            _, prefix, form, items = text.rules[subject]
            shapes[subject in core][form, len(items), prefix] += 1
    assert mean(same_place) == pytest.approx(1 / 4, abs=0.02)
    assert mean(kinds) > 0.85
    assert mean(most_named) > 0.5
    for shape, count in shapes[True].most_common(4):
        share = count / shapes[True].total()
        assert share > 0.05
        assert shapes[False][shape] / shapes[False].total() == pytest.approx(share, rel=0.3)


def test_rows(tokenizer):
    task = GSMInfinite(tokenizer, tokens=(700, 1200), window_size=512)
    rows = task.rows(3, "train", range(40))
    assert len({row["difficulty"] for row in rows}) > 5
    for i, row in enumerate(rows):
        problem = task.problem(random.Random(f"GSMInfinite/3/train/{i}"))
        prompt, target = tokenizer(problem.prompt)["input_ids"], tokenizer(f" {problem.answer}")["input_ids"]
        assert row["input_ids"] == [*prompt, *target, tokenizer.eos_token_id]
        assert row["labels"] == [-100] * len(prompt) + [*target, tokenizer.eos_token_id]
        assert tokenizer.decode(row["input_ids"]) == f"{problem.prompt} {problem.answer}</s>"
        assert (row["difficulty"], row["answer"], row["mode"]) == (problem.op, problem.answer, problem.mode)
        assert (row["depth"], row["template"]) == (problem.depth, problem.template)
        assert len(row["input_ids"]) <= task.length
        assert task.score([*row["input_ids"][1:], 0], row) == [(problem.op, True)]
        assert task.score([*row["input_ids"][1:-1], 0, 0], row) == [(problem.op, False)]
    assert list(task.dataset(5, 3)) == list(islice(task.stream(3), 5)) == rows[:5]
    assert list(islice(task.stream(3, start=4), 2)) == rows[4:6]
    assert task.rows(3, "test", range(5)) != rows[:5]
    assert GSMInfinite.paper(tokenizer) == GSMInfinite(tokenizer, tokens=(2000, 3300), ops=(1, 8), window_size=2000)
    assert task.vocab_size == max(tokenizer.get_vocab().values()) + 1
    assert task.difficulties == (1, 2, 3, 4, 5, 6, 7, 8)


def test_bare_rows_fit_the_length(tokenizer):
    task = GSMInfinite(tokenizer, ops=(8, 8), tokens=(0, 0))
    longest = max(len(row["input_ids"]) for row in task.rows(0, "train", range(300)))
    assert task.length / 3 < longest <= task.length


def test_prompts_do_not_end_with_a_window(tokenizer):
    fields = {"ops": (1, 3), "tokens": (400, 900)}
    window_size, bad = 128, 0
    free = GSMInfinite(tokenizer, **fields)
    task = GSMInfinite(tokenizer, **fields, window_size=window_size)
    for seed in range(150):
        size = len(tokenizer(free.problem(seed).prompt)["input_ids"])
        bad += (size - 1) // window_size != (size + 2) // window_size
        row = task.encode(task.problem(seed))
        size = sum(label == -100 for label in row["labels"])
        assert (size - 1) // window_size == (len(row["input_ids"]) - 1) // window_size
    assert bad > 0


def test_tokens_that_span_words(wide_tokenizer):
    task = GSMInfinite(wide_tokenizer, tokens=(700, 1200), window_size=512)
    for row in task.rows(0, "train", range(30)):
        size = sum(label == -100 for label in row["labels"])
        assert 700 <= size <= 1200
        assert row["input_ids"].count(wide_tokenizer.bos_token_id) == 1
        assert row["input_ids"][0] == wide_tokenizer.bos_token_id


def test_exact_match(tokenizer):
    task = GSMInfinite(tokenizer, tokens=(0, 0))
    row, eos = {"answer": 12}, tokenizer.eos_token_id
    for text, right in [(" 12", True), ("12", True), (" 1", False), (" 123", False), (" 12.", False), (" 12 3", False)]:
        ids = tokenizer(text)["input_ids"]
        assert task.exact_match(ids, row) is right
        assert task.exact_match([*ids, eos, *ids], row) is right
    assert not task.exact_match([], row)
    assert not task.exact_match([eos, *tokenizer(" 12")["input_ids"]], row)


@pytest.mark.parametrize("d", [2, 3])
def test_chance(d):
    task = GSMInfinite(tokens=(0, 0), d=d)
    for op in task.difficulties:
        assert 0.3 <= task.chance(op, "reverse") <= 0.4
        assert task.chance(op) == mean(task.chance(op, mode) for mode in MODES)
    assert 0.25 <= task.chance(1, "forward") <= 0.3
    assert task.chance(8, "forward") < 0.15
    forward = GSMInfinite(tokens=(0, 0), d=d, modes=("forward",), ops=(4, 4))
    answers = Counter(forward.problem(seed).answer for seed in range(1000))
    assert answers.most_common(1)[0][1] / 1000 == pytest.approx(forward.chance(4), abs=0.05)
    assert forward.chance(4) == majority("forward", 4, d)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ops": (0, 8)}, r"ops=\(0, 8\) cannot work: it must be \(fewest, most\), integers from 1 to 30"),
        ({"ops": (3, 2)}, r"ops=\(3, 2\)"),
        ({"ops": (1, 31)}, r"ops=\(1, 31\)"),
        ({"ops": 8}, "ops=8"),
        ({"modes": ("backward",)}, r"modes=\('backward',\) cannot work: .*'forward', 'reverse'"),
        ({"modes": "forward"}, "modes='forward'"),
        ({"modes": ()}, r"modes=\(\)"),
        ({"d": 4}, "d=4 cannot work: it must be an integer from 2 to 3"),
        ({"templates": ("planets",)}, "templates=.*'animals', 'schools', 'films'"),
        ({"noise": "loud"}, "noise='loud' cannot work: .*'disjoint', 'overlapping'"),
        ({"tokens": (1000, 60_000)}, r"tokens=\(1000, 60000\) .* to 50000"),
        ({"tokens": (100, 900)}, r"tokens=\(100, 900\) .* fewest must be at least \d{3}, for a problem"),
        ({"tokens": (1000, 1050)}, r"tokens=\(1000, 1050\) .* most must be at least 1\d{3}, for two sentences"),
        ({"tokens": (0, 900)}, r"tokens=\(0, 900\)"),
        ({"question_first": 1}, "question_first=1 cannot work: it must be True or False"),
        ({"window_size": 0}, "window_size=0"),
        ({"window_size": 16}, r"window_size=16 cannot work: it must be at least \d+, for a sentence"),
        ({"tokenizer": None}, "tokenizer=None cannot work: rows need one"),
    ],
)
def test_mistakes_are_named(tokenizer, fields, message):
    with pytest.raises(ValueError, match=f"GSMInfinite.{message}"):
        GSMInfinite(**{"tokenizer": tokenizer, **fields})


def test_other_mistakes_are_named(tokenizer):
    bare = GSMInfinite(tokens=(0, 0))
    with pytest.raises(ValueError, match="tokenizer=None cannot work"):
        bare.example(0)
    with pytest.raises(ValueError, match="seed='0' cannot work"):
        bare.problem("0")
    with pytest.raises(ValueError, match="difficulty=0 cannot work"):
        bare.chance(0)
    with pytest.raises(ValueError, match="mode='backward' cannot work"):
        bare.chance(1, "backward")
    with pytest.raises(ValueError, match="its eos_token must be set"):
        GSMInfinite(fast(tokenizer.backend_tokenizer), tokens=(0, 0))


def test_speed():
    task = GSMInfinite(tokens=(0, 0))
    task.problem(0)
    start = time.process_time()
    for seed in range(1000):
        task.problem(seed)
    assert 1000 / (time.process_time() - start) > 2000
