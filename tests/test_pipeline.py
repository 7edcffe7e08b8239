"""Pipelines: transformers' own with a model that sleeps, and ours, which reads a context once and asks many times."""

import copy
import functools
import json
import threading

import pytest
import torch
from families import VOCAB, make_base, make_model, sleep_config, tokens
from peft import PromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TextIteratorStreamer, TextStreamer, pipeline
from transformers.pipelines import PIPELINE_REGISTRY, base

from hf_sleep import (
    AutoModelForSleepLM,
    SleepConfig,
    SleepEvent,
    SleepForCausalLM,
    SleepSession,
    SleepStore,
    SleepStreamer,
    SleepTextGenerationPipeline,
    sleep_lora_config,
)

L = 12
TASK = "sleep-text-generation"
KEYWORDS = {"max_new_tokens": L + 3, "do_sample": False}
TEMPLATE = (
    "{% if mood is defined %}{{ mood + ' ' }}{% endif %}"
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """A word for every token, and a chat template."""
    named = ["<pad>", "<eos>", "user", "assistant", "system"]
    words = {word: i for i, word in enumerate(named)} | {f"w{i}": i for i in range(len(named), VOCAB)}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", chat_template=TEMPLATE, model_max_length=8
    )


def text(length, seed):
    return " ".join(f"w{max(5, int(token))}" for token in tokens(length, seed))


def chat(*lengths):
    """A conversation whose messages have so many words."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text(n, 7 * n + i)} for i, n in enumerate(lengths)]


@functools.cache
def sleeper(**fields) -> SleepForCausalLM:
    """Make a model in float64, so that two ways to the same logits choose the same token. Nothing may change it."""
    return make_model("llama", sleep_config("llama", **{"window_size": L, "sleep_passes": 3} | fields), torch.double)


def passes_of(model, call):
    """What a call returns, and how many passes of sleeps it ran."""
    numbers = []
    with model.register_pass_hook(lambda event: numbers.append(event.number)):
        return call(), numbers


TEXTS = [text(2 * L + 5, 1), text(3, 2), text(L, 3), text(L + 1, 4)]
CHATS = [chat(2 * L), chat(3), chat(5, 4, L), chat(L, 2)]  # the last one's answer has begun


# transformers' own.


@pytest.mark.parametrize("asked", [TEXTS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_batch_gets_the_answers_that_each_gets_alone(asked, size, tokenizer):
    pipe = pipeline("text-generation", model=sleeper(), tokenizer=tokenizer)
    batched, numbers = passes_of(pipe.model, lambda: pipe(asked, batch_size=size, **KEYWORDS))
    assert numbers.count(3) > 1
    assert batched == [pipe(one, **KEYWORDS) for one in asked]
    assert batched == list(pipe((one for one in asked), **KEYWORDS))


def test_a_chat_is_answered_as_generate_answers_its_template(tokenizer):
    pipe = pipeline("text-generation", model=sleeper(), tokenizer=tokenizer)
    ids = tokenizer.apply_chat_template(CHATS[0], add_generation_prompt=True, return_tensors="pt").input_ids
    said = sleeper().generate(ids, pad_token_id=0, eos_token_id=1, **KEYWORDS)[0, ids.shape[1] :]
    (answered,) = pipe(CHATS[0], eos_token_id=1, **KEYWORDS)
    expected = {"role": "assistant", "content": tokenizer.decode(said, skip_special_tokens=True)}
    assert answered["generated_text"] == [*CHATS[0], expected]


@pytest.mark.parametrize("fields", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}, {"sleep_passes": 1}])
def test_keywords_of_generate_reach_it(fields, tokenizer):
    pipe = pipeline("text-generation", model=sleeper(), tokenizer=tokenizer)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    made, numbers = passes_of(pipe.model, lambda: pipe(TEXTS[0], return_tensors=True, **KEYWORDS, **fields))
    assert [row["generated_token_ids"] for row in made] == sleeper().generate(ids, **KEYWORDS, **fields).tolist()
    assert max(numbers) == fields.get("sleep_passes", 3)


def test_streamers_stream_through_sleeps(tokenizer, capsys):
    pipe = pipeline("text-generation", model=sleeper(), tokenizer=tokenizer, return_full_text=False)
    (whole,) = pipe(TEXTS[0], streamer=TextStreamer(tokenizer, skip_prompt=True), **KEYWORDS)
    assert capsys.readouterr().out.split() == whole["generated_text"].split()
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=pipe, args=(TEXTS[0],), kwargs={"streamer": pieces, **KEYWORDS})
    thread.start()
    assert "".join(pieces).split() == whole["generated_text"].split()
    thread.join()


def test_a_sleep_streamer_marks_sleeps(tokenizer, capsys):
    pipe = pipeline("text-generation", model=sleeper(), tokenizer=tokenizer, return_full_text=False)
    (whole,) = pipe(TEXTS[0], streamer=SleepStreamer(tokenizer, "|{tokens} ", skip_prompt=True), **KEYWORDS)
    prompt, asleep, *rest = capsys.readouterr().out.split("|")
    assert prompt == ""
    assert asleep == f"{L} "
    first, second = (part.partition(" ") for part in rest)
    assert (first[0], second[0]) == (f"{2 * L}", f"{3 * L}")
    assert (first[2] + second[2]).split() == whole["generated_text"].split()
    # The token that it made at the full window's end is read after the sleep. transformers 5.22 streams it then too.
    read = 3 * L - (2 * L + 5)
    assert len(first[2].split()) in (read, read + 1)
    SleepStreamer(tokenizer).on_sleep(SleepEvent(0, 12, 0.5, 3))
    assert capsys.readouterr().out == " [slept after 12 tokens] "


def test_a_sessions_streamer_is_told_of_each_sleep_once(tokenizer, capsys):
    read = session(tokenizer, sleep_before_turns="never")
    events = []
    with read.model.on_sleep(events.append):
        read.ask(QUESTIONS[1], streamer=SleepStreamer(tokenizer, "|{tokens} ", skip_prompt=True), **KEYWORDS)
    assert len(events) > 1
    assert [int(part.split()[0]) for part in capsys.readouterr().out.split("|")[1:]] == [e.tokens for e in events]


def test_it_is_known_and_left_as_it_was(tokenizer, monkeypatch):
    errors = []
    monkeypatch.setattr(base.logger, "error", errors.append)
    model = make_model("llama", sleep_config("llama", window_size=L), torch.double)
    before = model.generation_config.to_dict()
    pipeline("text-generation", model=model, tokenizer=tokenizer)(TEXTS[0], max_new_tokens=2)
    assert not errors
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("only_sleep", [False, True])
def test_a_checkpoint_is_loaded_by_its_name(only_sleep, tokenizer, tmp_path):
    make_base("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForSleepLM.from_pretrained(tmp_path / "base", sleep=SleepConfig(window_size=L, num_blocks=2))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "made", **{"only_sleep": only_sleep} if part is model else {})
    pipe = pipeline("text-generation", model=str(tmp_path / "made"))
    made, numbers = passes_of(pipe.model, lambda: pipe(CHATS[0], **KEYWORDS))
    assert numbers.count(2)
    assert made == pipeline("text-generation", model=model, tokenizer=tokenizer)(CHATS[0], **KEYWORDS)


def test_an_adapter_answers(tokenizer):
    model = make_model("llama", sleep_config("llama", window_size=L), torch.double)
    adapted = get_peft_model(model, sleep_lora_config(model, r=2, init_lora_weights=False))
    (made,) = pipeline("text-generation", model=adapted, tokenizer=tokenizer)(TEXTS[0], return_tensors=True, **KEYWORDS)
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    assert made["generated_token_ids"] == model.generate(ids, **KEYWORDS)[0].tolist()
    with adapted.disable_adapter():
        assert made["generated_token_ids"] != model.generate(ids, **KEYWORDS)[0].tolist()


# Ours.

CONTEXT = text(3 * L + 4, 11)
QUESTIONS = [text(3, 12), text(L + 2, 13), text(1, 14)]


def ours(tokenizer, model=None, **kw):
    return pipeline(TASK, model=sleeper() if model is None else model, tokenizer=tokenizer, progress=False, **kw)


def session(tokenizer, **settings):
    made = SleepSession(sleeper(), tokenizer, **settings)
    made.read(CONTEXT, progress=False)
    return made


def test_it_is_registered():
    assert PIPELINE_REGISTRY.check_task(TASK)[1]["impl"] is SleepTextGenerationPipeline


def test_questions_are_answered_as_a_session_answers_each(tokenizer):
    pipe, read = ours(tokenizer), session(tokenizer)
    answers = [read.ask(question, **KEYWORDS) for question in QUESTIONS]
    assert len(set(answers)) == 3
    assert pipe(CONTEXT, questions=QUESTIONS, **KEYWORDS) == {"answers": answers}
    assert pipe(CONTEXT, question=QUESTIONS[1], **KEYWORDS) == {"answer": answers[1]}
    assert pipe(CONTEXT, questions=[]) == {"answers": []}


def test_a_context_is_read_once(tokenizer):
    pipe = ours(tokenizer)
    _, numbers = passes_of(pipe.model, lambda: pipe(CONTEXT, questions=QUESTIONS, max_new_tokens=1))
    _, alone = passes_of(pipe.model, lambda: pipe(CONTEXT, question=QUESTIONS[0], max_new_tokens=1))
    assert numbers.count(3) <= alone.count(3) + 2  # the long question's own


def test_several_contexts_are_read_one_by_one(tokenizer, tmp_path):
    pipe = ours(tokenizer, question=QUESTIONS[0], **KEYWORDS)
    (tmp_path / "text.txt").write_text(CONTEXT, encoding="utf-8")
    ids = torch.tensor(tokenizer(CONTEXT, add_special_tokens=False).input_ids)
    expected = [pipe(CONTEXT), pipe("w5 w6")]
    assert pipe([CONTEXT, "w5 w6"]) == expected
    assert list(pipe(one for one in (CONTEXT, "w5 w6"))) == expected
    assert pipe([tmp_path / "text.txt", ids]) == [expected[0]] * 2
    with pytest.raises(ValueError, match="batch_size must be 1: contexts are read one by one"):
        pipe([CONTEXT, "w5 w6"], batch_size=2)


@pytest.mark.parametrize("asked", [{}, {"question": "w5", "questions": ["w5"]}])
def test_it_says_what_to_ask(asked, tokenizer):
    with pytest.raises(ValueError, match=r"pass question=… or questions=\[…\], one of them"):
        ours(tokenizer)(CONTEXT, **asked)


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"chat": False}, {"chat": False}),
        ({"system": "w9 w8"}, {"system": "w9 w8"}),
        ({"sleep_passes": 1}, {"sleep_passes": 1}),
        ({"sleep_before_turns": "never"}, {"sleep_before_turns": "never"}),
        ({"chat_template_kwargs": {"mood": "w7"}}, {"mood": "w7"}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_settings_are_the_sessions(given, settings, tokenizer):
    expected = session(tokenizer, **settings).ask(QUESTIONS[1], **KEYWORDS)
    assert expected != session(tokenizer).ask(QUESTIONS[1], **KEYWORDS)
    assert ours(tokenizer)(CONTEXT, question=QUESTIONS[1], **KEYWORDS, **given) == {"answer": expected}
    assert ours(tokenizer, **given)(CONTEXT, question=QUESTIONS[1], **KEYWORDS) == {"answer": expected}


def test_a_store_spares_the_reading(tokenizer, tmp_path):
    pipe = ours(tokenizer, store=SleepStore(tmp_path), question=QUESTIONS[0], **KEYWORDS)
    first, numbers = passes_of(pipe.model, lambda: pipe(CONTEXT))
    again, fewer = passes_of(pipe.model, lambda: pipe(CONTEXT))
    assert again == first
    assert len(fewer) < len(numbers)


def test_a_bar_shows_a_long_context(tokenizer, capfd):
    pipe = pipeline(TASK, model=sleeper(), tokenizer=tokenizer)
    pipe(CONTEXT, question="w5", max_new_tokens=1)
    assert "sleeps" in capfd.readouterr().err
    pipe(CONTEXT, question="w5", max_new_tokens=1, progress=False)
    assert "sleeps" not in capfd.readouterr().err


def test_a_base_is_retrofitted_and_saved_as_a_checkpoint(tokenizer, tmp_path):
    for part in (make_base("llama"), tokenizer):
        part.save_pretrained(tmp_path / "base")
    sleep = SleepConfig(window_size=L, num_blocks=2)
    pipe = pipeline(TASK, model=str(tmp_path / "base"), model_kwargs={"sleep": sleep}, progress=False)
    assert pipe.model.config.sleep.window_size == L
    pipe.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made" / "pipeline.py").exists()
    for name in ("config.json", "tokenizer_config.json"):
        saved = json.loads((tmp_path / "made" / name).read_text(encoding="utf-8"))
        assert "custom_pipelines" not in saved
        assert ("sleep" in saved) == (name == "config.json")
    again = pipeline(TASK, model=str(tmp_path / "made"), progress=False)
    asked = {"questions": QUESTIONS, **KEYWORDS}
    assert again(CONTEXT, **asked) == pipe(CONTEXT, **asked)


def test_an_adapter_reads_and_answers(tokenizer):
    model = make_model("llama", sleep_config("llama", window_size=L), torch.double)
    adapted = get_peft_model(model, sleep_lora_config(model, r=2, init_lora_weights=False))
    asked = {"questions": QUESTIONS, **KEYWORDS}
    made = ours(tokenizer, adapted)(CONTEXT, **asked)
    assert made == ours(tokenizer, model)(CONTEXT, **asked)
    with adapted.disable_adapter():
        assert made != ours(tokenizer, adapted)(CONTEXT, **asked)


def test_a_session_is_of_a_model_that_sleeps(tokenizer):
    with pytest.raises(TypeError, match="model is a LlamaForCausalLM, which does not sleep"):
        SleepSession(make_base("llama"), tokenizer)


def test_an_adapter_outside_the_layers_is_refused(tokenizer):
    adapted = get_peft_model(
        make_model("llama", sleep_config("llama", window_size=L)),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    )
    with pytest.raises(TypeError, match="PromptTuningConfig, whose prompt is not in the model's layers"):
        SleepSession(adapted, tokenizer)


def test_a_long_text_is_no_warning(tokenizer, monkeypatch):
    warned = []
    monkeypatch.setattr("transformers.tokenization_utils_base.logger.warning", warned.append)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.deprecation_warnings = {}  # those that were given once
    session(tokenizer)
    assert not warned
    tokenizer(CONTEXT)
    assert warned
