"""SleepSession: law 10, and what people do with a memory: read, ask, undo, erase, save."""

import copy
import gc
import multiprocessing
import pickle
import threading
import time
from dataclasses import replace

import pytest
import torch
import transformers
from families import FAMILIES, make_model, sleep_config
from helpers import EVICTIONS, word_tokenizer, words
from serving import letters, tiny
from tokenizers import processors
from transformers import GenerationConfig

from hf_sleep import SleepCache, SleepSession, SleepState, SleepStore, UntilSettled
from hf_sleep.held import chained, chained_sleep
from hf_sleep.memory import Memory

L = 12
GREEDY = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": list(range(5))}  # words alone
SPREAD = [
    *((family, list(EVICTIONS)[i % 4], 2) for i, family in enumerate(sorted(FAMILIES))),
    *(("llama", eviction, passes) for eviction in EVICTIONS for passes in (1, 4)),
]


def session(family="llama", eviction="hard", dtype=torch.double, tokenizer=None, settings=None, **fields):
    """A session of a tiny trained model in float64, whose window is short."""
    style, sinks = EVICTIONS[eviction]
    defaults = {"window_size": L, "eviction": style, "num_sink_tokens": sinks, "sleep_passes": 2}
    model = make_model(family, sleep_config(family, **(defaults | fields)), dtype)
    model.generation_config.eos_token_id = None
    return SleepSession(model, tokenizer or word_tokenizer(), **(settings or {}))


def tensors(memory: Memory) -> list[torch.Tensor]:
    found = []
    memory.map(lambda t: found.append(t) or t)
    return found


def copies(s: SleepSession) -> list[torch.Tensor]:
    return [t.clone() for t in tensors(s._held.memory)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def close(a: Memory, b: Memory) -> bool:
    assert a.counters == b.counters
    return all(torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in zip(tensors(a), tensors(b), strict=True))


every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
spread = pytest.mark.parametrize(("family", "eviction", "passes"), SPREAD)
every_eviction = pytest.mark.parametrize("eviction", EVICTIONS)


@spread
def test_10_asking_changes_nothing_and_a_batch_answers_as_each_question_alone(family, eviction, passes):
    s = session(family, eviction, sleep_passes=passes)
    s.read(words(2 * L + 3))
    before, held = copies(s), s._held
    questions = [words(2, 5), words(4, 6), words(9, 7), words(1, 8)]
    alone = [s.ask(question, **GREEDY) for question in questions]
    assert s.ask_many(questions, **GREEDY) == alone
    assert [s.ask(question, **GREEDY) for question in reversed(questions)] == alone[::-1]
    assert s._held is held
    assert same(copies(s), before)
    assert len(set(alone)) > 1


@every_eviction
def test_a_session_is_the_model_reading_what_the_template_makes(eviction):
    """Read, asked and answered: the same tokens, read and slept on by hand, leave the same memory."""
    s = session(eviction=eviction, settings={"sleep_before_turns": "never"})
    text, question = words(2 * L + 3), words(3, 2)
    s.read(text)
    answer = s.chat(question, **GREEDY)
    tokenizer, model = s.tokenizer, s.model
    messages = [
        {"role": "user", "content": f"{text} {question}"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "w1"},
    ]
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True).input_ids
    s.read("w1")
    (row,), cache = s._held.memory.counters, SleepCache()
    with torch.no_grad():
        model(ids[:, : row.seen], cache=cache)
    assert close(s._held.memory, replace(cache.memory, columns=row.seen))


def test_the_first_question_is_what_generate_answers():
    s = session()
    question = words(3)
    said = s.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = s.model.generate(**said, **GREEDY)
    assert s.ask(question, **GREEDY) == s.tokenizer.decode(output[0, said.input_ids.shape[1] :], True)


def test_a_tokenizer_without_a_template_works_too():
    s = session(tokenizer=word_tokenizer(chat=False))
    text, question = words(3), words(2, 2)
    s.read(text)
    ids = s.tokenizer(f"{text} {question}", return_tensors="pt").input_ids
    output = s.model.generate(ids, **GREEDY)
    assert s.ask(question, **GREEDY) == s.tokenizer.decode(output[0, ids.shape[1] :], True)
    with pytest.raises(ValueError, match="chat=True: this tokenizer has no chat template"):
        session(tokenizer=word_tokenizer(chat=False), settings={"chat": True})


def test_a_turn_that_does_not_fit_is_slept_before_and_one_that_fits_is_not():
    s = session()
    s.read(words(4))
    prompt = len(s.steps.turns.asking(s._held.speaking, words(2, 2)))
    fits = L - s.report().window_tokens - prompt
    events = []
    with s.model.on_sleep(events.append):
        s.ask(words(2, 2), do_sample=False, max_new_tokens=fits)
        assert not events
        s.ask(words(2, 2), do_sample=False, max_new_tokens=fits + 1)
        assert [event.tokens for event in events] == [s.report().tokens]
        s.ask(words(2, 3), do_sample=False, max_new_tokens=fits + 1)
        assert len(events) == 1, "slept once for many questions"
    answers = {}
    for when in ("always", "never"):
        twin = session(settings={"sleep_before_turns": when})
        twin.read(words(4))
        answers[when] = twin.ask(words(2, 2), do_sample=False, max_new_tokens=fits)
    assert answers["never"] == s.ask(words(2, 2), do_sample=False, max_new_tokens=fits) != answers["always"]
    with pytest.raises(ValueError, match="sleep_before_turns='seldom' cannot work: it must be one of when_needed, "):
        session(settings={"sleep_before_turns": "seldom"})


def test_what_is_read_may_be_many_things(tmp_path):
    text = words(L + 3)
    (tmp_path / "story.txt").write_text(text, encoding="utf-8")
    ids = word_tokenizer()(text).input_ids
    memories = []
    for how in (text, tmp_path / "story.txt", ids, torch.tensor(ids), iter(text.split(" "))):
        s = session()
        assert s.read(how) == L + 3
        memories.append(s._held.memory)
    with (tmp_path / "story.txt").open(encoding="utf-8") as file:
        s = session()
        s.read(file)
    assert all(close(s._held.memory, memory) for memory in memories)
    (source,) = s.report().sources
    assert (source.title, source.tokens) == ("story.txt", L + 3)
    for wrong, message in (
        (5, "text is of type int: it must be a string"),
        (b"w1", "text is of type bytes"),
        ([1, 9999], "text holds the id 9999: ids must be from 0 to"),
        ([1, "a"], "a piece is of type int: it must be a string"),
    ):
        held = s._held
        with pytest.raises(ValueError, match=message):
            s.read(wrong)
        assert s._held is held


def test_progress_is_told_and_an_interrupt_keeps_the_windows_that_were_read(tmp_path):
    s, told = session(), []
    text = words(4 * L)

    def stop_after_two(progress):
        told.append(progress)
        if progress.sleeps == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        s.read(text, on_progress=stop_after_two, title="half")
    assert [p.tokens for p in told] == [L - 1, 2 * L - 1]  # the template opens with one token
    assert told[-1].total == 4 * L
    assert told[-1].num_bytes == s.report().num_bytes
    (source,) = s.report().sources
    assert (source.title, source.tokens) == ("half", 2 * L - 1)
    s.save(tmp_path / "half.sleep")
    rest = s.tokenizer(text).input_ids[2 * L - 1 :]
    s.read(rest)
    whole = session()
    whole.read(text)
    assert same(copies(s), copies(whole))


def test_undo_takes_back_the_last_step_and_rollback_what_came_after_the_last_sleep():
    s = session(settings={"sleep_before_turns": "never"})
    with pytest.raises(ValueError, match="nothing to undo"):
        s.undo()
    with pytest.raises(ValueError, match="has not slept since it was made or loaded"):
        s.rollback()
    s.read(words(2 * L + 3))
    before, report = copies(s), s.report()
    s.chat(words(2, 2), **GREEDY)
    s.undo()
    assert same(copies(s), before)
    assert s.report() == report
    with pytest.raises(ValueError, match="nothing to undo"):
        s.undo()
    s.rollback()
    assert (s.report().tokens, s.report().window_tokens) == (2 * L, 0)
    by_hand = session()
    by_hand.read(words(2 * L - 1), then_sleep=True)
    assert same(copies(s), copies(by_hand))
    s.undo()
    assert same(copies(s), before)
    s.ask(words(2, 2), **GREEDY)
    with pytest.raises(ValueError, match="nothing to undo"):  # a question from a fork was no step
        s.undo()


def test_a_sleep_in_the_middle_of_an_answer_is_one_to_roll_back_to():
    s = session(settings={"sleep_before_turns": "never"})
    s.chat(words(2), do_sample=False, max_new_tokens=2 * L)
    report = s.report()
    assert report.sleeps == 2
    s.rollback()
    assert (s.report().tokens, s.report().window_tokens) == (2 * L, 0)
    whole = session()
    ids = whole.steps.turns.asking("nobody", words(2))
    said = whole.steps.answer(whole._held, ids, {"do_sample": False, "max_new_tokens": 2 * L})[1]
    by_hand = whole.steps.read_all(whole._held, (ids + said)[: 2 * L])
    assert close(s._held.memory, whole.steps.sleep(by_hand).memory)


def test_forgetting_leaves_nothing():
    """In a process of its own: all its live tensors are searched, and none is another test's."""
    with multiprocessing.get_context("spawn").Pool(1) as process:
        process.apply(_forget_and_search)


def _forget_and_search():
    s = session()
    s.read(words(2 * L + 3))
    s.ask(words(8, 3), **GREEDY)
    s.chat(words(2, 2), **GREEDY)
    held = [s._held, s._before]
    kept = [t for part in held for memory in part.memories() for t in tensors(memory)]
    marks = {float(t.flatten()[t.abs().argmax()]) for t in kept if t.numel() and bool(t.any())}
    model = {p.untyped_storage().data_ptr() for p in (*s.model.parameters(), *s.model.buffers())}
    assert len(marks) > 5
    s.forget()
    assert not any(bool(t.any()) for t in kept)
    del kept, held
    gc.collect()
    live = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.is_floating_point()]
    live = [t for t in live if t.untyped_storage().data_ptr() not in model]
    assert not any(bool(torch.isin(t.double(), torch.tensor(list(marks), dtype=torch.double)).any()) for t in live)
    assert s.report().tokens == 0
    fresh = session()
    assert s.ask(words(3), **GREEDY) == fresh.ask(words(3), **GREEDY)


@spread
def test_what_must_not_be_consolidated_can_be_asked_about_and_never_reaches_the_fast_weights(family, eviction, passes):
    after, answers = [], []
    for secret in (words(4, 11), words(4, 12)):
        s = session(family, eviction, sleep_passes=passes)
        s.read(words(L + 1))
        s.read(secret, do_not_consolidate=True)
        s.read(words(2, 3))
        answers.append(s.model(torch.tensor([[7]]), cache=s.steps.cache(s._held.memory)).logits)
        s.read(words(L, 4))
        after.append(copies(s))
    assert not torch.equal(*answers), "the text was not readable in its window"
    assert same(*after)
    without = session(family, eviction, sleep_passes=passes)
    without.read(words(L + 1))
    without.read(words(2, 3))
    without.read(words(L, 4))
    assert close(s._held.memory, without._held.memory)


def test_a_private_text_is_not_saved_not_slept_on_and_must_fit(tmp_path):
    s = session()
    s.read(words(3))
    public = s.report()
    with pytest.raises(ValueError, match="do_not_consolidate: the text has 30 tokens, and the window has room for"):
        s.read(words(30, 2), do_not_consolidate=True)
    assert s.report() == public
    s.read(words(4, 2), do_not_consolidate=True)
    with pytest.raises(ValueError, match=r"question and answer take up to \d+ tokens, and beside the text"):
        s.ask(words(2), max_new_tokens=2 * L)
    s.save(tmp_path / "a.sleep")
    loaded = SleepSession.load(tmp_path / "a.sleep", s.model, s.tokenizer)
    assert loaded.report().tokens == public.tokens
    s.sleep()
    other = session()
    other.read(words(3))
    other.sleep()
    assert close(s._held.memory, other._held.memory)


@every_family
def test_9_a_saved_session_continues_token_for_token(family, tmp_path):
    s = session(family, dtype=torch.float32)
    s.read(words(2 * L + 3), title="a story")
    s.chat(words(2, 2), **GREEDY)
    s.save(tmp_path / "a.sleep")
    loaded = SleepSession.load(tmp_path / "a.sleep", s.model, s.tokenizer)
    assert loaded.report() == s.report()
    assert [loaded.chat(words(3, i), **GREEDY) for i in range(4)] == [s.chat(words(3, i), **GREEDY) for i in range(4)]
    assert loaded._held.chain == s._held.chain
    assert same(copies(loaded), copies(s))
    data = (tmp_path / "a.sleep").read_bytes()
    assert b"a story" in data
    assert words(3).encode() not in data


def _save_for_ever(sessions, path):
    torch.set_num_threads(1)
    while True:
        for s in sessions:
            s.save(path)


def test_killed_while_it_saves_a_session_leaves_the_file_before_or_after(tmp_path):
    s = session(dtype=torch.float32)
    s.read(words(L + 3))
    other = s.fork()
    other.read(words(2 * L, 2))
    path = tmp_path / "a.sleep"
    s.save(path)
    context, whole = multiprocessing.get_context("fork"), {s.report().tokens: s, other.report().tokens: other}
    found = set()
    for i in range(20):
        process = context.Process(target=_save_for_ever, args=((s, other), path))
        process.start()
        time.sleep(0.05 + 0.003 * i)
        process.kill()
        process.join()
        loaded = SleepSession.load(path, s.model, s.tokenizer)
        found.add(loaded.report().tokens)
        assert same(copies(loaded), copies(whole[loaded.report().tokens]))
    assert found <= whole.keys()


def test_a_file_of_another_tokenizer_or_of_no_session_is_refused(tmp_path):
    s = session(dtype=torch.float32)
    with pytest.raises(ValueError, match="the session has read nothing"):
        s.save(tmp_path / "a.sleep")
    s.read(words(3))
    s.save(tmp_path / "a.sleep")
    other = word_tokenizer()
    other.add_tokens(["another"])
    with pytest.raises(ValueError, match=r"a\.sleep was read with another tokenizer"):
        SleepSession.load(tmp_path / "a.sleep", s.model, other)
    state = SleepState.load(tmp_path / "a.sleep")
    for about, message in (
        (None, "no session saved"),
        (state.about | {"speaking": "me"}, "does not say what a session saves: speaking, passes"),
        (state.about | {"sources": [{"a": 1}]}, "does not say what a session saves: sources"),
        ({"tokenizer": state.about["tokenizer"]}, "does not say what a session saves: chain, speaking"),
    ):
        replace(state, about=about).save(tmp_path / "b.sleep")
        with pytest.raises(ValueError, match=message):
            SleepSession.load(tmp_path / "b.sleep", s.model, s.tokenizer)


def test_policies_are_a_session_s_or_a_text_s_and_are_reported():
    s = session(sleep_passes=1, settings={"sleep_passes": 3})
    s.read(words(L + 1))
    s.read(words(L, 2), sleep_passes=2)
    s.sleep(UntilSettled(cap=5, tolerance=0.0))
    assert s.report().sleep_passes == [3, 2, 5]
    other = session(sleep_passes=1)
    other.read(words(L + 1))
    assert not same(copies(s), copies(other))
    with pytest.raises(ValueError, match="sleep_passes=0"):
        session(settings={"sleep_passes": 0})
    held = s._held
    with pytest.raises(ValueError, match="sleep_passes=0"):
        s.read(words(3), sleep_passes=0)
    assert s._held is held


def test_the_report_adds_up():
    s = session()
    s.read(words(2 * L + 3), title="a")
    s.read(words(3, 2), title="b")
    report, cache = s.report(), s.steps.cache(s._held.memory)
    assert (report.sleeps, report.tokens, report.window_tokens) == (2, 2 * L + 7, 7)
    assert [(source.title, source.tokens) for source in report.sources] == [("a", 2 * L + 3), ("b", 3)]
    assert report.num_bytes == cache.num_bytes() > report.kv_bytes + report.fast_weight_bytes > 0
    assert report.seconds_awake > 0 < report.seconds_asleep
    how, ids = "2", [1, *s.tokenizer(words(2 * L + 3)).input_ids, *s.tokenizer(words(3, 2)).input_ids]
    chain = chained_sleep(chained(chained_sleep(chained("", ids[:L]), how), ids[L : 2 * L]), how)
    assert s._held.chain == chained(chain, ids[2 * L :])


def test_an_idle_session_sleeps_and_what_comes_next_ends_it():
    s = session()
    s.read(words(4))
    s.sleep_when_idle(0.01)
    timer = s._idle._timer
    timer.join(10)
    assert s.report().sleeps == 1
    by_hand = session()
    by_hand.read(words(4))
    by_hand.sleep()
    assert same(copies(s), copies(by_hand))
    s.sleep_when_idle(None)

    s = session(sleep_passes=4)
    s.read(words(4))
    before, reached, proceed = copies(s), threading.Event(), threading.Event()

    def slowly(event):
        if event.number == 2 and threading.current_thread() is not threading.main_thread():
            reached.set()
            proceed.wait(10)

    with s.model.register_pass_hook(slowly):
        s.sleep_when_idle(0.0)
        assert reached.wait(10)
        s._idle._cancelled.set()
        proceed.set()
        s._idle.pause()
    assert same(copies(s), before)
    assert s.report().sleeps == 0
    s.sleep_when_idle(None)
    answer = s.ask(words(2), **GREEDY)
    by_hand = session(sleep_passes=4)
    by_hand.read(words(4))
    assert by_hand.ask(words(2), **GREEDY) == answer


def test_a_stream_is_the_answer_in_pieces_and_may_be_left(request):
    s = session()
    s.read(words(L + 3))
    whole = s.ask(words(3), **GREEDY)
    assert "".join(s.stream(words(3), **GREEDY)).strip() == whole
    for _ in s.stream(words(3), do_sample=False, max_new_tokens=500):
        break
    assert threading.active_count() < 20
    with pytest.raises(ValueError, match="it must be a string that says something"):
        list(s.stream("  "))
    assert s.ask(words(3), **GREEDY) == whole


def test_a_beam_search_can_answer_and_cannot_be_remembered():
    s = session()
    s.read(words(3))
    held = s._held
    assert s.ask(words(2), num_beams=2, **GREEDY)
    with pytest.raises(ValueError, match="remember=True with num_beams"):
        s.chat(words(2), num_beams=2, **GREEDY)
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        s.ask(words(2), num_beams=2, num_return_sequences=2, **GREEDY)
    assert s._held is held


@pytest.mark.parametrize("of_the_model", [{}, {"max_new_tokens": 2}])
def test_a_generation_config_says_what_its_keywords_would_say(monkeypatch, of_the_model):
    """Its eos, pad and number of tokens hold; what it leaves open is the session's or the model's."""
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", pytest.fail)
    s = session()
    s.read(words(L + 3))
    s.model.generation_config.update(**of_the_model)
    words_alone = {"do_sample": False, "suppress_tokens": list(range(5))}
    said = s.ask(words(3), max_new_tokens=8, **words_alone).split()
    ends = s.tokenizer.convert_tokens_to_ids(said[2])
    for fields in ({"max_new_tokens": 8, "eos_token_id": ends, "pad_token_id": 7}, {"max_new_tokens": 8}, {}):
        config = GenerationConfig(**fields, **words_alone)
        before, twin = config.to_dict(), s.fork()
        answer = s.ask(words(3), **fields, **words_alone)
        assert s.ask(words(3), generation_config=config) == answer
        assert s.ask_many([words(3), words(2)], generation_config=config)[0] == answer
        assert "".join(s.stream(words(3), generation_config=config)).strip() == answer
        assert twin.chat(words(3), generation_config=config) == answer
        assert config.to_dict() == before
        if fields:
            assert len(answer.split()) == (1 + said.index(said[2]) if "eos_token_id" in fields else 8)


def test_a_generation_config_without_a_number_of_beams_has_the_model_s():
    s = session()
    s.read(words(3))
    s.model.generation_config.num_beams = 2
    config = GenerationConfig(**GREEDY)
    assert s.ask(words(2), generation_config=config) == s.ask(words(2), **GREEDY)
    with pytest.raises(ValueError, match="num_return_sequences must be 1"):
        s.ask(words(2), generation_config=GenerationConfig(num_beams=2, num_return_sequences=2, **GREEDY))


def test_the_passes_of_a_question_are_those_of_all_its_sleeps(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.generation.utils.logger, "warning_once", pytest.fail)
    settings = {"store": SleepStore(tmp_path), "sleep_before_turns": "never"}
    s = session(dtype=torch.float32, settings=settings)
    s.read(words(8))
    s.chat(words(2), sleep_passes=4, do_sample=False, max_new_tokens=2 * L)
    assert set(s.report().sleep_passes) == {4}
    fields = {"do_sample": False, "max_new_tokens": 2 * L}
    twin = s.fork()
    for passes, how in ((3, {}), (5, {"sleep_passes": 5})):
        before = len(twin.report().sleep_passes)
        twin.chat(words(2), generation_config=GenerationConfig(sleep_passes=3, **fields), **how)
        twin.sleep()
        assert set(twin.report().sleep_passes[before:-1]) == {passes}, "a config says it as a keyword does"
        assert twin.report().sleep_passes[-1] == s.model.config.sleep.sleep_passes
    files = set(tmp_path.rglob("*.sleep"))
    s.ask(words(2), do_sample=False, max_new_tokens=2 * L)
    assert set(tmp_path.rglob("*.sleep")) == files, "a question that is not kept is not stored"


def test_a_private_text_leaves_no_trace_in_a_file(tmp_path):
    abouts = []
    for secret in ("w1 w2 w3 w4", "w4 w3 w2 w1"):
        s = session(dtype=torch.float32)
        s.read(words(3))
        s.read(iter(secret.split()), do_not_consolidate=True, title="the code of the door")
        s.read("w5")
        s.save(tmp_path / "a.sleep")
        assert b"the code of the door" not in (tmp_path / "a.sleep").read_bytes()
        about = SleepState.load(tmp_path / "a.sleep").about
        abouts.append({name: value for name, value in about.items() if name not in ("awake", "asleep", "saved")})
    assert abouts[0] == abouts[1]
    held = s._held
    with pytest.raises(ValueError, match="do_not_consolidate"):
        s.read(iter([words(3), words(30)]), do_not_consolidate=True)
    assert s._held is held


def test_steps_within_a_step_leave_the_idle_timer_alone():
    s = session()
    s.sleep_when_idle(0.0)
    s.read(iter([words(3), words(3, 2)]), on_progress=lambda _: (s.to_state(), time.sleep(0.05)))
    s._idle._timer.join(10)
    assert s.report().tokens == 7
    s.sleep_when_idle(None)
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_seams_of_tokenizers_and_arguments():
    odd = word_tokenizer(chat=False)
    odd.bos_token = odd.eos_token = "<end>"
    odd._tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", odd.eos_token_id)]
    )
    s = session(tokenizer=odd)
    ids = odd(words(2), return_tensors="pt").input_ids
    assert ids[0, 0] == odd.eos_token_id
    assert s.steps.turns.asking("nobody", words(2))[:3] == ids[0].tolist()
    padded = word_tokenizer()
    padded.add_special_tokens({"pad_token": "<another pad>"})
    s = session(tokenizer=padded)
    assert s.ask_many([words(2), words(4)], **GREEDY) == [s.ask(words(2), **GREEDY), s.ask(words(4), **GREEDY)]
    with pytest.raises(ValueError, match="text is of type BatchEncoding"):
        s.read(padded(words(3)))
    with pytest.raises(ValueError, match="title=5: it must be a string"):
        s.read(words(3), title=5)
    with pytest.raises(ValueError, match="streamer: stream is one itself"):
        s.stream(words(2), streamer=None)
    ended = [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]
    assert (
        "".join(s.stream(words(2), stopping_criteria=ended, **GREEDY)).strip() == s.ask(words(2), **GREEDY).split()[0]
    )


def test_a_state_s_session_has_tensors_of_its_own():
    s = session(dtype=torch.float32)
    s.read(words(L + 2))
    before = copies(s)
    SleepSession.of_state(s.to_state(), s.model, s.tokenizer).forget()
    assert same(copies(s), before)


def test_a_question_after_a_rollback_into_an_answer_closes_it():
    s = session(settings={"sleep_before_turns": "never"})
    s.chat(words(2), do_sample=False, max_new_tokens=2 * L, suppress_tokens=list(range(5)))
    s.rollback()
    turns = s.steps.turns
    assert turns.asking(s._held.speaking, "w1") == turns.encode(turns.reopening + "w1" + turns.closing)


def test_a_fork_continues_alone():
    s = session()
    s.read(words(L + 3))
    before = copies(s)
    twin = s.fork()
    twin.chat(words(2), **GREEDY)
    assert same(copies(s), before)
    assert twin.report().tokens > s.report().tokens


def test_7_what_a_question_hands_to_generate_does_not_grow_with_what_was_read(monkeypatch):
    s, widths = session(), []
    generate = s.model.generate

    def watched(ids, attention_mask, **how):
        widths.append((ids.shape[1], attention_mask.shape[1]))
        return generate(ids, attention_mask=attention_mask, **how)

    monkeypatch.setattr(s.model, "generate", watched)
    for length in (3, 4 * L):
        s.read(words(length))
        s.ask(words(2, 2), **GREEDY)
        s.ask_many([words(2, 2), words(4, 2)], **GREEDY)
    assert all(ids == mask <= 8 for ids, mask in widths)


# Calls within calls, and what generate's keywords would do to a session.


@pytest.mark.parametrize("nested", ["guidance", "hook"])
def test_sleeps_of_calls_within_a_call_are_not_the_session_s(nested, tmp_path):
    """Guidance reads a negative prompt with a cache of its own; a hook may ask another session."""
    settings = {"sleep_before_turns": "never", "store": SleepStore(tmp_path)}
    plain, s = (session(dtype=torch.float32, settings=settings) for _ in range(2))
    heard, fields = [], {}
    if nested == "hook":
        other = SleepSession(s.model, s.tokenizer)
        other.read(words(L - 2, 5))

        def ask(event):
            if not heard:
                heard.append(event)
                assert other.ask("w1 w2 w3", **GREEDY | {"max_new_tokens": 2 * L})

        s.model.on_sleep(ask)
    else:
        fields = {"guidance_scale": 1.5, "negative_prompt_ids": torch.arange(6, 6 + 3 * L)[None]}
        s.model.on_sleep(heard.append)
    for one, how in ((plain, {}), (s, fields)):
        one.read(words(L + 4))
        one.chat(words(9, 3), **GREEDY | {"max_new_tokens": 4} | how)
    assert len(heard) > (0 if nested == "hook" else plain.report().sleeps), "calls within the call slept"
    for _ in range(2):
        assert s.report().sleep_passes == plain.report().sleep_passes == [2] * plain.report().sleeps
        assert s.report().tokens == plain.report().tokens
        assert same(copies(s), copies(plain)) or nested == "guidance"  # which says something else
        s.rollback()
        plain.rollback()
        assert same(copies(s), copies(plain))
    for path in tmp_path.rglob("*.sleep"):
        assert SleepState.load(path).rows[0].seen % L == 0


def test_what_ends_an_answer_besides_a_token_ends_each_of_a_batch():
    s = SleepSession(tiny(), letters())
    s.read("a long text of the sea and of its ships")
    questions, how = ["Who is it", "And where", "What"], {"do_sample": False, "max_new_tokens": 12}
    for ends in ({}, {"eos_token_id": None}):
        stop = s.ask(questions[0], **how, **ends)[3:5]
        stopped = how | ends | {"stop_strings": [stop], "tokenizer": s.tokenizer}
        alone = [s.ask(question, **stopped) for question in questions]
        assert alone[0].endswith(stop)
        assert len(alone[0]) < 12
        assert s.ask_many(questions, **stopped) == alone


def test_a_length_that_would_count_the_past_is_refused():
    s = session()
    s.read(words(3))
    for how in ({"max_length": 9}, {"generation_config": GenerationConfig(max_length=9)}):
        with pytest.raises(ValueError, match="max_length=9: it would count what the session has read"):
            s.ask("w1", **how)
    both = {"max_length": 9, "generation_config": None} | GREEDY
    for how in (both, {"generation_config": GenerationConfig(max_length=9, **GREEDY)}):
        assert s.ask("w1", **how) == s.ask("w1", **GREEDY), "generate leaves it out, too"


@pytest.mark.parametrize("text", ["w1 \ud800", "w1 \udcff w2"])
def test_what_is_no_unicode_is_refused_and_changes_nothing(text):
    s = session()
    s.read(words(3))
    held = s._held
    for step in (s.read, s.ask, s.chat, lambda text: s.read(iter([text]))):
        with pytest.raises(ValueError, match=r"the text is no Unicode: at \d+ is '\\ud"):
            step(text)
    assert s._held is held


def test_ids_of_several_texts_are_refused():
    s, one = session(), session()
    ids = torch.tensor([[7, 8, 9], [0, 0, 6]])
    with pytest.raises(ValueError, match=r"text has shape \(2, 3\): ids must be \[T\] or \[1, T\]"):
        s.read(ids)
    s.read(ids[:1])
    one.read([7, 8, 9])
    assert same(copies(s), copies(one))


def test_a_model_that_was_moved_to_another_dtype_says_so():
    s = session(dtype=torch.float32)
    s.read(words(L + 3))
    cache, ids = s.to_state().to_cache(s.model), torch.tensor([[7]])
    logits = s.model(ids, cache=cache.fork()).logits
    s.model.to(torch.bfloat16)
    for step in (
        lambda: s.model(ids, cache=cache),
        lambda: s.model.generate(ids, cache=cache, max_new_tokens=1),
        lambda: s.model.sleep(cache),
    ):
        with pytest.raises(ValueError, match=r"read by a model in torch\.float32, which is in torch\.bfloat16 now"):
            step()
    s.model.to(torch.float32)
    assert torch.allclose(s.model(ids, cache=cache).logits, logits, atol=0.1)  # weights were rounded meanwhile


def test_a_copy_is_a_fork_and_what_cannot_be_copied_says_so():
    s = session()
    s.read(words(L + 3))
    twin = copy.copy(s)
    assert twin._held is s._held
    assert twin._lock is not s._lock
    for step in (lambda: copy.deepcopy(s), lambda: pickle.dumps(s)):
        with pytest.raises(TypeError, match=r"fork\(\)|save\(path\)"):
            step()
