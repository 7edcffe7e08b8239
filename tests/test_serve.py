"""The server: OpenAI's API by its own package, memories that go on, and who may do what."""

import json
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest
from families import VOCAB
from serving import NAME, WINDOW, client, letters, served, tiny

from hf_sleep import SleepSession
from hf_sleep.serve.settings import ServeSettings
from hf_sleep.serve.text import Cut

GREEDY = {"temperature": 0, "max_tokens": 10}
SAME = {"do_sample": False, "max_new_tokens": 10}
"""The same for `generate`."""


def user(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with (
        served(store=str(tmp_path_factory.mktemp("store"))) as (url, app),
        client(url) as by_openai,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield SimpleNamespace(url=url, app=app, openai=by_openai, http=http)


@pytest.fixture
def memory(server, request):
    """The id of a new memory."""
    return server.http.post("/v1/memories", json={}).raise_for_status().json()["id"]


def chat(server, text, **how):
    how = GREEDY | {"model": NAME} | how
    return server.openai.chat.completions.create(messages=user(text) if isinstance(text, str) else text, **how)


def say(server, text, memory_id=None, **how):
    extra = {} if memory_id is None else {"extra_body": {"memory_id": memory_id}}
    return chat(server, text, **extra, **how).choices[0].message.content


def error(response, status):
    assert response.status_code == status, response.text
    told = response.json()["error"]
    assert told.keys() == {"message", "type", "param", "code"}
    return told


# OpenAI's API.


def test_the_model_is_listed(server):
    assert [model.id for model in server.openai.models.list()] == [NAME]
    assert server.openai.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError):
        server.openai.models.retrieve("another/model")


def test_a_chat_is_answered_as_a_session_answers(server):
    question = "How are you today, my friend"
    answer = chat(server, question)
    session = SleepSession(tiny(), letters())
    assert answer.choices[0].message.content == session.chat(question, **SAME)
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(question) + 3, 10)
    assert usage.total_tokens == usage.prompt_tokens + 10


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 1.3, "seed": 3},
        {"top_p": 0.5, "temperature": 1, "seed": 1},
        {"stop": ["g"]},
        {"temperature": 1e-45},
    ],
    ids=["greedy", "sampled", "top_p", "stop", "nearly greedy"],
)
def test_streamed_is_not_streamed(server, how):
    whole = chat(server, "Tell me of the sea and of its ships", max_tokens=40, **how)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *pieces, last = chat(server, "Tell me of the sea and of its ships", max_tokens=40, **how, **options)
    said = [piece.choices[0].delta.content or "" for piece in pieces]
    assert "".join(said) == whole.choices[0].message.content
    assert len([text for text in said if text]) > 3
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert last.usage == whole.usage


def test_seeds_and_temperature_and_top_p_count(server):
    def drawn(**how):
        return say(server, "Draw something", max_tokens=20, **{"temperature": 1.5} | how)

    first = drawn(seed=1)
    assert drawn(seed=1) == first != drawn(seed=2)
    assert drawn(seed=1, top_p=1e-9) == say(server, "Draw something", max_tokens=20) != first


def test_a_stop_ends_an_answer_and_is_no_part_of_it(server):
    whole = say(server, "And then", max_tokens=20)
    stop = whole[5:7]
    cut = chat(server, "And then", max_tokens=20, stop=[stop, "never said"])
    assert cut.choices[0].message.content == whole[: whole.index(stop)].rstrip()
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage.completion_tokens == whole.index(stop) + 2


def test_the_end_token_ends_an_answer(server):
    model = tiny()
    said = SleepSession(model, letters()).ask("And then", max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = letters().convert_tokens_to_ids(said[3])
    with served(model) as (url, _), client(url) as ours:
        answer = ours.chat.completions.create(model=NAME, messages=user("And then"), temperature=0)
    assert answer.choices[0].message.content == said[: said.index(said[3]) + 1]
    assert answer.choices[0].finish_reason == "stop"


def test_the_length_is_that_of_sessions_by_default(server):
    assert chat(server, "Hello", max_tokens=None).usage.completion_tokens == 64  # the most this server gives
    assert chat(server, "Hello", max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_sleeps_are_comments_of_the_stream(server):
    body = {"model": NAME, "messages": user("x" * (2 * WINDOW)), "stream": True, "max_tokens": 40, "temperature": 0}
    with server.http.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    sleeps = [line for line in lines if line.startswith(": sleep ")]
    assert [line.split(" seconds")[0] for line in sleeps[:2]] == [
        f": sleep tokens={WINDOW} passes=2",
        f": sleep tokens={2 * WINDOW} passes=2",
    ]
    assert lines[-1] == "data: [DONE]"
    assert all(json.loads(line[6:]) for line in lines[:-1] if line not in sleeps)


def test_completions_go_on_as_generate_does(server):
    ids = letters()("The ships that sailed that day were never", return_tensors="pt").input_ids
    said = letters().decode(tiny().generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :])
    how = {"model": NAME, "temperature": 0, "max_tokens": 12}
    text = letters().decode(ids[0])
    for prompt in (text, [text], ids[0].tolist()):
        answer = server.openai.completions.create(prompt=prompt, **how)
        assert answer.choices[0].text == said
        assert answer.usage.prompt_tokens == ids.shape[1]
    pieces = server.openai.completions.create(prompt=text, stream=True, **how)
    assert "".join(piece.choices[0].text for piece in pieces) == said


def test_completions_with_a_memory_send_only_what_is_new(server, memory):
    how = {"model": NAME, "temperature": 0, "max_tokens": 5, "extra_body": {"memory_id": memory}}
    first = server.openai.completions.create(prompt="The ships", **how).choices[0].text
    second = server.openai.completions.create(prompt=" and the sea", **how).choices[0].text
    whole = server.openai.completions.create(
        prompt="The ships" + first + " and the sea", model=NAME, temperature=0, max_tokens=5
    )
    assert second == whole.choices[0].text


BAD = [
    ({"n": 2}, "n", "unsupported_value"),
    ({"logprobs": True}, "logprobs", "unsupported_value"),
    ({"presence_penalty": 0.5}, "presence_penalty", "unsupported_value"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_value"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_value"),
    ({"min_p": 0.1}, "min_p", "unsupported_parameter"),
    ({"temperature": 2.5}, "temperature", "invalid_value"),
    ({"temperature": "1"}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"max_tokens": 65}, "max_tokens", "invalid_value"),
    ({"max_tokens": True}, "max_tokens", "invalid_value"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "invalid_value"),
    ({"seed": 2**64}, "seed", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": ""}, "stop", "invalid_value"),
    ({"stop": ["x" * 65]}, "stop", "invalid_value"),
    ({"stop": 3}, "stop", "invalid_value"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "assistant", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": user("a") * 2}, "messages.1.role", "invalid_value"),
    ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, "messages", "invalid_value"),
    ({"messages": user(" ")}, "messages.0.content", "invalid_value"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages", "invalid_value"),
    ({"remember": True}, "remember", "invalid_value"),
    ({"memory_id": "../../etc"}, "memory_id", "invalid_id"),
    ({"model": None}, "model", "invalid_value"),
]


@pytest.mark.parametrize(("wrong", "param", "code"), BAD, ids=[str(wrong)[:50] for wrong, _, _ in BAD])
def test_what_cannot_be_is_refused_in_openai_s_shape(server, wrong, param, code):
    body = {"model": NAME, "messages": user("Hello")} | wrong
    told = error(server.http.post("/v1/chat/completions", json=body), 400)
    assert (told["param"], told["code"], told["type"]) == (param, code, "invalid_request_error")
    assert told["message"]


def test_usual_values_of_what_is_not_there_are_taken(server):
    usual = {"n": 1, "presence_penalty": 0.0, "logprobs": False, "response_format": {"type": "text"}, "user": "me"}
    assert chat(server, "Hello", **usual).choices[0].message.content == say(server, "Hello")


def test_openai_s_package_sees_errors_as_its_own(server):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, "Hello", n=3)
    assert (caught.value.param, caught.value.code) == ("n", "unsupported_value")
    with pytest.raises(openai.NotFoundError, match="this server has one model"):
        chat(server, "Hello", model="gpt")
    with pytest.raises(openai.NotFoundError, match="there is no memory 'nowhere'"):
        say(server, "Hello", "nowhere", stream=True)


def test_bodies_that_are_no_json_are_refused(server):
    kind = {"content-type": "application/json"}
    for content in (
        b"{",
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"a": 1' + b"0" * 9000,
    ):
        error(server.http.post("/v1/chat/completions", content=content, headers=kind), 400)
    body = json.dumps({"model": NAME, "messages": user("\ud800")})
    assert "Unicode" in error(server.http.post("/v1/chat/completions", content=body, headers=kind), 400)["message"]
    error(server.http.post("/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 400)
    error(server.http.get("/v1/chat/completions"), 405)
    error(server.http.get("/v1/nothing"), 404)


@pytest.mark.parametrize("stripped", [True, False])
def test_text_in_pieces_is_cut_as_a_whole(stripped):
    text = "  one, two and  three STOPPED and STOP more "
    for stops in ([], ["STOP"], ["and  t", "STOP"], ["absent"]):
        expected = text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
        expected = expected.strip() if stripped else expected
        for size in range(1, 12):
            cut = Cut(stops, stripped)
            said = [cut.feed(text[at : at + size]) for at in range(0, len(text), size)]
            assert "".join([*said, cut.end()]) == expected


# Memories.


def test_a_memory_goes_on_from_request_to_request(server, memory):
    session = SleepSession(tiny(), letters())
    for turn in ("My name is Ada", "I sail on the sea", "What is my name", "And what do I do"):
        assert say(server, turn, memory) == session.chat(turn, **SAME)
    report = server.http.get(f"/v1/memories/{memory}").json()
    assert report["sleeps"] == session.report().sleeps > 2
    assert (report["tokens"], report["num_bytes"]) == (session.report().tokens, session.report().num_bytes)


def test_a_header_names_a_memory_too(server, memory):
    answers = []
    for how in ({"extra_headers": {"X-Memory-Id": memory}}, {"extra_body": {"memory_id": memory}}):
        answers.append(chat(server, "Hello again", **how).choices[0].message.content)
    session = SleepSession(tiny(), letters())
    assert answers == [session.chat("Hello again", **SAME) for _ in range(2)]
    body = {"model": NAME, "messages": user("Hello"), "memory_id": memory}
    told = error(server.http.post("/v1/chat/completions", json=body, headers={"X-Memory-Id": "other"}), 400)
    assert told["param"] == "memory_id"


def test_without_a_memory_the_whole_conversation_is_read_as_if_it_had_taken_place(server, memory):
    messages, turns = [{"role": "system", "content": "Be brief"}], ("My name is Ada", "I sail", "What is my name")
    for number, turn in enumerate(turns):
        messages += user(turn)
        stateless = chat(server, messages)
        sent = messages if number == 0 else user(turn)
        remembered = chat(server, sent, extra_body={"memory_id": memory})
        assert stateless.choices[0].message.content == remembered.choices[0].message.content
        messages.append({"role": "assistant", "content": stateless.choices[0].message.content})
    assert stateless.usage.prompt_tokens > 3 * remembered.usage.prompt_tokens


def test_a_system_message_stands_at_the_start_alone(server, memory):
    told = [{"role": "system", "content": "Be brief"}, *user("Hello")]
    first = say(server, told, memory)
    session = SleepSession(tiny(), letters(), system="Be brief")
    assert first == session.chat("Hello", **SAME) != say(server, "Hello")
    with pytest.raises(openai.BadRequestError, match="this one has begun"):
        say(server, told, memory)
    made = server.http.post("/v1/memories", json={"system": "Be brief"}).json()["id"]
    with pytest.raises(openai.BadRequestError, match="this one has begun"):
        say(server, told, made)
    assert say(server, "Hello", made) == first
    with pytest.raises(openai.BadRequestError, match="only the new message is sent"):
        say(server, [*user("a"), {"role": "assistant", "content": "b"}, *user("c")], memory)


def test_a_turn_may_be_forgotten_at_once(server, memory):
    say(server, "My name is Ada", memory)
    before = server.http.get(f"/v1/memories/{memory}/file").content
    answer = say(server, "And then", memory, stream=False)
    server.http.put(f"/v1/memories/{memory}/file", content=before).raise_for_status()
    report = server.http.get(f"/v1/memories/{memory}").json()
    body = {"memory_id": memory, "remember": False}
    assert [chat(server, "And then", extra_body=body).choices[0].message.content for _ in range(2)] == [answer] * 2
    after = server.http.get(f"/v1/memories/{memory}").json()
    assert after | {"used": 0} == report | {"used": 0}


def test_texts_are_read_and_asked_about(server, memory):
    url, text = f"/v1/memories/{memory}", "the quick brown fox jumps over the lazy dog and on"
    told = server.http.post(f"{url}/read", json={"text": text, "title": "fox.txt", "then_sleep": True}).json()
    assert (told["read"], told["window_tokens"]) == (len(text), 0)
    assert [source["title"] for source in told["sources"]] == ["fox.txt"]
    session = SleepSession(tiny(), letters())
    session.read(text, then_sleep=True)
    questions = ["Who jumps", "Over whom does it jump today"]
    how = {"temperature": 0, "max_tokens": 10}
    answers = server.http.post(f"{url}/ask", json={"questions": questions, **how}).json()["answers"]
    assert answers == [session.ask(question, **SAME) for question in questions]
    assert server.http.post(f"{url}/ask", json={"question": questions[0], **how}).json()["answers"] == answers[:1]
    drawn = [
        server.http.post(f"{url}/ask", json={"question": "Who", "seed": seed, "max_tokens": 5}).json()["answers"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert server.http.get(url).json() | {"used": 0, "read": 0} == told | {"used": 0, "read": 0}
    told = server.http.post(f"{url}/read", json={"text": "more"}).json()
    assert told["window_tokens"] > 0
    assert told["sources"][-1]["title"] == "text"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("read", {"text": ""}, "text"),
        ("read", {"text": 3}, "text"),
        ("read", {"text": "a", "title": "x" * 201}, "title"),
        ("read", {"text": "a", "do_not_consolidate": True}, "do_not_consolidate"),
        ("ask", {}, "question"),
        ("ask", {"question": "a", "questions": ["b"]}, "question"),
        ("ask", {"questions": ["a"] * 33}, "questions"),
        ("ask", {"questions": [" "]}, "questions"),
        ("ask", {"question": "a", "max_tokens": 65}, "max_tokens"),
    ],
)
def test_what_cannot_be_read_or_asked_is_refused(server, memory, path, body, param):
    assert error(server.http.post(f"/v1/memories/{memory}/{path}", json=body), 400)["param"] == param


def test_memories_are_made_listed_and_forgotten(server):
    made = server.http.post("/v1/memories", json={"id": "ada-1"})
    assert (made.status_code, made.json()["tokens"]) == (201, 0)
    assert error(server.http.post("/v1/memories", json={"id": "ada-1"}), 409)["code"] == "exists"
    assert error(server.http.get("/v1/memories/ada-1/file"), 409)["code"] == "memory_empty"
    say(server, "My name is Ada", "ada-1")
    listed = {m["id"]: m for m in server.http.get("/v1/memories").json()["data"]}
    assert listed["ada-1"]["in_ram"]
    memories = server.app.state.worker.memories
    tensors = []
    for held in memories.kept["anybody", "ada-1"].session._held.memories():
        held.map(lambda t: tensors.append(t) or t)
    assert any(bool(t.any()) for t in tensors)
    assert server.http.delete("/v1/memories/ada-1").json() == {"id": "ada-1", "object": "memory", "deleted": True}
    assert not any(bool(t.any()) for t in tensors)
    for response in (
        server.http.delete("/v1/memories/ada-1"),
        server.http.get("/v1/memories/ada-1"),
        server.http.get("/v1/memories/ada-1/file"),
        server.http.post("/v1/memories/ada-1/read", json={"text": "x"}),
    ):
        assert error(response, 404)["code"] == "memory_not_found"
    assert "ada-1" not in {m["id"] for m in server.http.get("/v1/memories").json()["data"]}
    assert server.http.post("/v1/memories", json={"id": "ada-1"}).json()["tokens"] == 0
    assert say(server, "Hello", "ada-1") == say(server, "Hello")


@pytest.mark.parametrize(
    "id", ["..", "../x", "A", "a/b", "a.b", "", "x" * 65, "con\n", "a%00", "ä", "-a", "a\r\nINFO x"]
)
def test_ids_lead_nowhere_else(server, id):
    assert error(server.http.post("/v1/memories", json={"id": id}), 400)["code"] == "invalid_id"
    body = {"model": NAME, "messages": user("Hello"), "memory_id": id}
    assert error(server.http.post("/v1/chat/completions", json=body), 400)["code"] == "invalid_id"
    quoted = "".join(f"%{byte:02x}" for byte in id.encode())
    for path in (f"/v1/memories/{quoted}", f"/v1/memories/{quoted}/file"):
        response = server.http.request("DELETE" if path.endswith(quoted) else "PUT", path, content=b"x")
        assert response.status_code in (400, 404, 405), response.text


def test_a_file_goes_down_and_up_and_on(server, memory, tmp_path):
    say(server, "My name is Ada", memory)
    response = server.http.get(f"/v1/memories/{memory}/file")
    assert response.headers["content-disposition"] == f'attachment; filename="{memory}.sleep"'
    path = tmp_path / "ada.sleep"
    path.write_bytes(response.content)
    session = SleepSession.load(path, tiny(), letters())
    expected = session.chat("What is my name", **SAME)
    put = server.http.put("/v1/memories/uploaded/file", content=response.content)
    assert put.json()["tokens"] == server.http.get(f"/v1/memories/{memory}").json()["tokens"]
    assert say(server, "What is my name", "uploaded") == say(server, "What is my name", memory) == expected
    session.save(path)
    server.http.put(f"/v1/memories/{memory}/file", content=path.read_bytes())
    assert say(server, "And then", memory) == session.chat("And then", **SAME)


def test_metrics_count(server, memory):
    def metrics():
        lines = server.http.get("/metrics").text.splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    before = metrics()
    usage = chat(server, "x" * (2 * WINDOW), extra_body={"memory_id": memory}).usage
    server.http.post(f"/v1/memories/{memory}/read", json={"text": "abc"})
    after = metrics()
    more = {name: after[name] - before.get(name, 0) for name in after}
    path = 'hf_sleep_requests_total{method="POST",path="/v1/chat/completions",status="200"}'
    assert more[path] == 1
    assert not any(memory in name for name in after)
    assert more["hf_sleep_tokens_read_total"] == usage.prompt_tokens + 3
    assert more["hf_sleep_tokens_generated_total"] == 10
    assert more["hf_sleep_sleeps_total"] >= 2
    assert more["hf_sleep_asleep_seconds_total"] > 0
    memories = server.app.state.worker.memories
    assert after["hf_sleep_memories_in_ram"] == len(memories.kept)
    assert after["hf_sleep_memory_bytes"] == memories.num_bytes > 0
    assert after["hf_sleep_queue_length"] == 0
    server.http.request("BREW", "/a/path/of/their/own")
    assert metrics()['hf_sleep_requests_total{method="other",path="unknown",status="404"}'] >= 1


def test_settings_that_cannot_work_are_refused():
    for wrong in ({"max_queue": 0}, {"ttl": 0}, {"tokens": ("a b",)}, {"prefix_bytes": 5}, {"max_ram_bytes": 1.5}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("tokens", "token")):
            ServeSettings("tiny", **wrong)


def test_the_tiny_model_is_one_of_which_memory_matters():
    assert len(letters()) == VOCAB
    model, session = tiny(), SleepSession(tiny(), letters())
    session.read("The ships that sailed that day were never seen again", then_sleep=True)
    assert session.ask("And then", **SAME) != SleepSession(model, letters()).ask("And then", **SAME)
