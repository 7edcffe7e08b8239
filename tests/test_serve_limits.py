"""The server among others and against others: one store for two, what does not fit, who is gone, and the hostile."""

import asyncio
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
import torch
from serving import NAME, WINDOW, client, letters, served, tiny
from typer.testing import CliRunner

from hf_sleep import SleepSession, SleepState
from hf_sleep.cli import app as command
from hf_sleep.config import SETTINGS
from hf_sleep.serve.errors import ApiError
from hf_sleep.serve.guard import Guard
from hf_sleep.serve.memories import Memories
from hf_sleep.serve.metrics import Metrics
from hf_sleep.serve.settings import ServeSettings
from hf_sleep.serve.shelf import Changed, Shelf
from hf_sleep.serve.worker import Worker

SAME = {"do_sample": False, "max_new_tokens": 6}


def user(text):
    return [{"role": "user", "content": text}]


def body(text, **how):
    return {"model": NAME, "messages": user(text), "temperature": 0, "max_tokens": 6} | how


@contextmanager
def by_http(model=None, token=None, **settings):
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    with served(model, **settings) as (url, app), httpx.Client(base_url=url, timeout=60, headers=headers) as http:
        yield http, app


def say(http, text, **how):
    response = http.post("/v1/chat/completions", json=body(text, **how))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def code(response, status):
    assert response.status_code == status, response.text
    return response.json()["error"]["code"]


def wait_until(holds, seconds=20):
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def metric(http, name):
    lines = http.get("/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"hf_sleep_{name} "))


# One store.


def test_a_memory_outlives_the_server(tmp_path):
    session, url = SleepSession(tiny(), letters()), f"file://{tmp_path}"
    with by_http(store=url) as (http, _):
        http.post("/v1/memories", json={"id": "ada"})
        http.post("/v1/memories", json={"id": "new", "system": "Be brief"})
        assert say(http, "My name is Ada", memory_id="ada") == session.chat("My name is Ada", **SAME)
    with by_http(store=url) as (http, app):
        assert not app.state.worker.memories.kept
        assert [m["id"] for m in http.get("/v1/memories").json()["data"]] == ["ada", "new"]
        assert say(http, "What is my name", memory_id="ada") == session.chat("What is my name", **SAME)
        expected = SleepSession(tiny(), letters(), system="Be brief").chat("Hello", **SAME)
        assert say(http, "Hello", memory_id="new") == expected


@pytest.mark.parametrize("store", ["{tmp}", "memory://serve-{tmp}"])
def test_two_servers_continue_each_other_s_memories(tmp_path, store):
    session, url = SleepSession(tiny(), letters()), store.format(tmp=tmp_path)
    with by_http(store=url) as (one, app), by_http(store=url) as (two, _):
        one.post("/v1/memories", json={"id": "ada"})
        for number, turn in enumerate(("My name is Ada", "I sail", "And you", "What is my name")):
            assert say((one, two)[number % 2], turn, memory_id="ada") == session.chat(turn, **SAME)
        reports = [http.get("/v1/memories/ada").json() | {"used": 0} for http in (one, two)]
        assert reports[0] == reports[1]
        two.delete("/v1/memories/ada")
        assert app.state.worker.memories.kept  # stale, and not served
        assert code(one.post("/v1/chat/completions", json=body("Hello", memory_id="ada")), 404) == "memory_not_found"
        assert not app.state.worker.memories.kept


def test_what_one_server_forgot_another_does_not_bring_back(tmp_path, monkeypatch):
    """Not even when the store itself has forgotten that it was there, and a new memory has its name."""
    settings = ServeSettings("tiny", store=str(tmp_path))
    one, two, busy = (Memories(tiny(), letters(), settings) for _ in range(3))

    def read(memories, text, title):
        kept = memories.current("me", "ada")
        session = kept.session.fork()
        session.read(text, title=title, progress=False)
        memories.commit("me", "ada", kept, session)

    one.create("me", "ada", None)
    read(one, "a secret", "the first")
    busy.current("me", "ada")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 7200)
    two.forget("me", "ada")
    monkeypatch.setattr(time, "time", lambda: now + 14400)
    for memories in (two, one):
        memories.sweep()
    assert not one.kept
    assert not list(tmp_path.rglob("*.memory"))
    two.create("me", "ada", None)
    read(two, "nothing of it", "the second")
    for memories in (one, two, busy):  # the last has swept nothing
        assert [source["title"] for source in memories.report("me", "ada")["sources"]] == ["the second"]
    read(busy, "and more", "the third")
    assert [source["title"] for source in two.report("me", "ada")["sources"]] == ["the second", "the third"]


def test_a_change_that_another_server_overtook_is_refused_and_changes_nothing(tmp_path):
    settings = ServeSettings("tiny", store=str(tmp_path))
    one, two = (Memories(tiny(), letters(), settings) for _ in range(2))
    one.create("me", "ada", None)
    mine, theirs = one.current("me", "ada"), two.current("me", "ada")
    for memories, kept, text in ((two, theirs, "theirs"), (one, mine, "mine")):
        session = kept.session.fork()
        session.read(text, progress=False)
        if memories is two:
            memories.commit("me", "ada", kept, session)
        else:
            with pytest.raises(ApiError, match="another server changed the memory 'ada' meanwhile"):
                memories.commit("me", "ada", kept, session)
    assert one.current("me", "ada").session.tokens == two.current("me", "ada").session.tokens == len("theirs") + 1
    overtaken = one.current("me", "ada")
    two.forget("me", "ada")
    with pytest.raises(ApiError, match="another server changed"):
        one.commit("me", "ada", overtaken, overtaken.session.fork())
    with pytest.raises(ApiError, match="there is no memory"):
        one.current("me", "ada")


def test_another_model_s_memories_are_not_there(tmp_path):
    with by_http(store=str(tmp_path)) as (http, _):
        http.post("/v1/memories", json={"id": "ada"})
    with by_http(tiny(window_size=WINDOW + 1), store=str(tmp_path)) as (http, _):
        assert not http.get("/v1/memories").json()["data"]


def test_the_same_beginning_is_read_once(tmp_path):
    text = "the quick brown fox jumps over the lazy dog and then over the cat "
    with by_http(store=str(tmp_path), prefix_bytes=10**7) as (http, _):
        slept = []
        for id in ("one", "two"):
            http.post("/v1/memories", json={"id": id})
            before = metric(http, "sleeps_total")
            http.post(f"/v1/memories/{id}/read", json={"text": text + id}).raise_for_status()
            slept.append(metric(http, "sleeps_total") - before)
        assert slept == [len(text) // WINDOW, 0]
        assert list((tmp_path / "prefixes" / "anybody").rglob("*.sleep"))


WRITER = """
    import sys
    from importlib.util import find_spec, module_from_spec
    # Without the package's __init__, which imports torch and takes seconds.
    sys.modules["hf_sleep"] = module_from_spec(find_spec("hf_sleep"))
    from hf_sleep.serve.shelf import Shelf
    shelf = Shelf(sys.argv[1], "model")
    version = shelf.newest("me", "ada").version if shelf.newest("me", "ada") else 0
    while True:
        version += 1
        shelf.write("me", "ada", version, (f"{version}," * 400_000).encode())
        print(version, flush=True)
"""


def test_a_writer_that_is_killed_loses_and_tears_nothing(tmp_path):
    """Twenty times: the newest version is whole, and none is older than what was said to be written."""
    script, folder = textwrap.dedent(WRITER), tmp_path / "store"
    shelf, least = Shelf(folder, "model"), 0
    for _ in range(20):
        with subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True) as writer:
            first = writer.stdout.readline()
            assert first
            time.sleep(random.random() * 0.03)
            writer.kill()
            told = [int(line) for line in (first, *writer.stdout) if line.endswith("\n")]
        newest = shelf.newest("me", "ada")
        assert shelf.read(newest) == (f"{newest.version}," * 400_000).encode()
        assert newest.version >= told[-1] > least
        least = told[-1]
    parts = list(folder.rglob(".*.part"))
    for part in parts:
        os.utime(part, (1, 1))
    shelf.sweep(None)
    assert not list(folder.rglob(".*.part"))


def test_a_version_is_written_once_by_whoever_comes_first(tmp_path):
    shelves, outcomes = [Shelf(tmp_path, "model") for _ in range(4)], []

    def write(shelf, number):
        try:
            shelf.write("me", "ada", 1, b"%d" % number * 10_000)
            outcomes.append(number)
        except Changed:
            pass

    threads = [threading.Thread(target=write, args=pair) for pair in zip(shelves, range(4), strict=True)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    (won,) = outcomes
    assert shelves[0].read(shelves[0].newest("me", "ada")) == b"%d" % won * 10_000


# Bad files.


@pytest.fixture(scope="module")
def state():
    session = SleepSession(tiny(), letters())
    session.read("the quick brown fox jumps over the lazy dog")
    return session.to_state()


def bad_files(state):
    good = state.to_bytes()
    with torch.no_grad():
        other = tiny()
        other.lm.model.norm.weight.add_(1)
    stranger = SleepSession(other, letters())
    stranger.read("hello")
    (row,) = state.rows
    huge = replace(row, seen=2**40 + row.fill, sleeps=2**40)
    about = state.about
    return {
        "empty": b"",
        "text": b"hello",
        "json": b'{"system": "x"}',
        "cut": good[:-3],
        "changed": good[:-3] + b"abc",
        "header": b"\xff" * 8 + good[8:],
        "large header": (10**8 - 1).to_bytes(8, "little") + b" " * 100,
        "model": stranger.to_state().to_bytes(),
        "tokenizer": replace(state, about=about | {"tokenizer": "another"}).to_bytes(),
        "no session": replace(state, about=None).to_bytes(),
        "seconds": replace(state, about=about | {"awake": float("nan")}).to_bytes(),
        "sources": replace(state, about=about | {"sources": [{"title": 3, "tokens": "x", "sha256": None}]}).to_bytes(),
        "no sources": replace(state, about=about | {"sources": 3}).to_bytes(),
        "columns": replace(state, columns=2**40).to_bytes(),
        "tokens": replace(state, columns=huge.seen, rows=[huge]).to_bytes(),
    }


def test_a_bad_file_is_refused_and_the_server_goes_on(state, tmp_path):
    with by_http(store=str(tmp_path)) as (http, _):
        http.put("/v1/memories/good/file", content=state.to_bytes()).raise_for_status()
        before = http.get("/v1/memories/good").json()
        for name, content in bad_files(state).items():
            for id in ("good", "bad"):
                response = http.put(f"/v1/memories/{id}/file", content=content)
                assert code(response, 400) == "invalid_memory", name
        assert http.get("/v1/memories/good").json() | {"used": 0} == before | {"used": 0}
        assert [m["id"] for m in http.get("/v1/memories").json()["data"]] == ["good"]
        (path,) = tmp_path.rglob("m-good/*.memory")
        version = before["version"]
        path.with_name(f"{version + 1:012d}.memory").write_bytes(state.to_bytes()[:-9])
        assert code(http.get("/v1/memories/good"), 409) == "invalid_memory"
        assert code(http.post("/v1/chat/completions", json=body("Hello", memory_id="good")), 409) == "invalid_memory"
        http.put("/v1/memories/good/file", content=state.to_bytes()).raise_for_status()
        assert http.get("/v1/memories/good").json()["version"] == version + 2
        path.with_name(f"{version + 3:012d}.memory").write_bytes(b'{"system": 3}')
        assert code(http.get("/v1/memories/good"), 409) == "invalid_memory"
        assert http.delete("/v1/memories/good").json()["deleted"]
        assert http.get("/health").text == "ok\n"


# Who may ask.


def test_a_token_is_needed_and_has_memories_of_its_own(tmp_path):
    with served(store=str(tmp_path), tokens=("one", "two"), hosts=()) as (url, _), httpx.Client(base_url=url) as http:
        for header in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}, {"Authorization": "Basic one"}):
            for path in ("/v1/models", "/v1/memories", "/metrics", "/v1/nothing"):
                response = http.get(path, headers=header)
                assert code(response, 401) == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
        with client(url, "wrong") as wrong, pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        one, two = ({"Authorization": f"Bearer {token}"} for token in ("one", "two"))
        for header in (one, two):
            assert http.post("/v1/memories", json={"id": "ada"}, headers=header).status_code == 201
        http.post("/v1/memories/ada/read", json={"text": "secret"}, headers=one).raise_for_status()
        http.post("/v1/memories", json={"id": "mine"}, headers=one)
        assert http.get("/v1/memories/ada", headers=two).json()["tokens"] == 0
        assert code(http.get("/v1/memories/mine", headers=two), 404) == "memory_not_found"
        assert code(http.delete("/v1/memories/mine", headers=two), 404) == "memory_not_found"
        assert [m["id"] for m in http.get("/v1/memories", headers=two).json()["data"]] == ["ada"]
        assert http.get("/metrics", headers=two).status_code == 200
    names = [path.as_posix() for path in tmp_path.rglob("*")]
    assert not any("/one" in name or "/two" in name for name in names)


def test_a_page_that_renamed_itself_to_this_machine_is_refused():
    with by_http() as (http, _):
        for host, status in (("localhost:1234", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 421)):
            assert http.get("/v1/models", headers={"Host": host}).status_code == status


# What does not fit.


def test_memories_that_were_not_used_leave_ram_and_come_back(tmp_path):
    session = SleepSession(tiny(), letters())
    one = SleepSession(tiny(), letters())
    one.chat("My name is 0", **SAME)
    room = 3 * one.report().num_bytes
    with by_http(store=str(tmp_path), max_ram_bytes=room) as (http, app):
        for number in range(5):
            http.post("/v1/memories", json={"id": f"m{number}"})
            say(http, f"My name is {number}", memory_id=f"m{number}")
            assert app.state.worker.memories.num_bytes <= room
        in_ram = [m["in_ram"] for m in http.get("/v1/memories").json()["data"]]
        assert in_ram[0] is False
        assert in_ram[-1] is True
        session.chat("My name is 0", **SAME)
        assert say(http, "What is it", memory_id="m0") == session.chat("What is it", **SAME)
        assert next(m["in_ram"] for m in http.get("/v1/memories").json()["data"])


def test_without_a_store_what_has_no_room_is_refused_and_changes_nothing():
    one = SleepSession(tiny(), letters())
    one.chat("My name is 0", **SAME)
    with by_http(max_ram_bytes=one.report().num_bytes + 10) as (http, _):
        for id in ("one", "two"):
            http.post("/v1/memories", json={"id": id})
        say(http, "My name is 0", memory_id="one")
        assert code(http.post("/v1/chat/completions", json=body("Hello", memory_id="two")), 507) == "memories_full"
        assert http.get("/v1/memories/two").json()["tokens"] == 0
        http.delete("/v1/memories/one")
        say(http, "Hello", memory_id="two")


def test_there_is_a_most_of_memories_for_each_token(tmp_path):
    for store in (None, str(tmp_path)):
        with by_http(store=store, max_memories=2) as (http, _):
            for id in ("a", "b"):
                assert http.post("/v1/memories", json={"id": id}).status_code == 201
            assert code(http.post("/v1/memories", json={}), 400) == "too_many_memories"
            http.delete("/v1/memories/a")
            assert http.post("/v1/memories", json={}).status_code == 201


def test_memories_that_nobody_used_are_forgotten(tmp_path):
    for store in (None, str(tmp_path)):
        with by_http(store=store, ttl=0.3) as (http, app):
            http.post("/v1/memories", json={"id": "ada"})
            time.sleep(0.1)
            assert http.get("/v1/memories/ada").status_code == 200
            wait_until(lambda: not app.state.worker.memories.kept)
            assert code(http.get("/v1/memories/ada"), 404) == "memory_not_found"
    (left,) = tmp_path.rglob("*.memory")
    assert left.read_bytes() == b""
    os.utime(left, (1, 1))
    Shelf(tmp_path, left.parts[-4]).sweep(None)
    assert not list(tmp_path.rglob("m-ada"))


def test_a_full_queue_says_when_to_come_again():
    with by_http(max_queue=1) as (http, app):
        blocked, going = threading.Event(), threading.Event()

        def block(job):
            blocked.set()
            going.wait(20)

        async def submit():
            return app.state.worker.submit(block)

        asyncio.run(submit())
        assert blocked.wait(20)
        waiting = threading.Thread(target=lambda: say(http, "Hello"))
        waiting.start()
        wait_until(lambda: metric(http, "queue_length") == 1)
        response = http.post("/v1/chat/completions", json=body("Hello"))
        assert code(response, 503) == "overloaded"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert http.get("/health").status_code == 200
        going.set()
        waiting.join(20)
        assert say(http, "Hello")


def test_bodies_have_a_largest_size():
    with by_http(max_body_bytes=1000, max_upload_bytes=2000) as (http, _):
        assert say(http, "x" * 500)
        for method, path, size in (("POST", "/v1/chat/completions", 1001), ("PUT", "/v1/memories/a/file", 2001)):
            for content in (b"x" * size, iter([b"x" * (size // 2)] * 3)):
                response = http.request(method, path, content=content, headers={"content-type": "application/json"})
                assert code(response, 413) == "body_too_large"
        assert code(http.put("/v1/memories/a/file", content=b"x" * 1500), 400) == "invalid_memory"


def raw(http, text: bytes) -> socket.socket:
    made = socket.create_connection((http.base_url.host, http.base_url.port), timeout=20)
    made.sendall(text)
    return made


def request_of(path: str, content: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content


def test_a_body_that_does_not_come_is_not_waited_for():
    with by_http(seconds_to_send=0.2) as (http, _):
        with raw(http, request_of("/v1/memories", b"{}")[:-1]) as slow:
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert http.get("/health").status_code == 200


def test_a_client_that_takes_nothing_is_not_waited_for():
    async def answers(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def never(message):
        await asyncio.sleep(60)

    metrics = Metrics(lambda: 0)
    guard = Guard(answers, ServeSettings("tiny", seconds_to_send=0.05), metrics)
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    asyncio.run(asyncio.wait_for(guard(scope, None, never), 10))
    assert b'status="408"} 1.0' in metrics.text()


@pytest.mark.parametrize("stream", [True, False])
def test_what_nobody_waits_for_is_dropped_and_not_remembered(stream):
    model, calls = tiny(window_size=1500), []  # it does not sleep on the way
    model.register_forward_hook(lambda *_: calls.append(1))
    with by_http(model, max_tokens=1000) as (http, app):
        http.post("/v1/memories", json={"id": "ada"})
        content = json.dumps(body("Hello", memory_id="ada", stream=stream, max_tokens=1000)).encode()
        with raw(http, request_of("/v1/chat/completions", content)) as leaving:
            if stream:
                assert b"200 OK" in leaving.recv(100)
            wait_until(lambda: app.state.worker._current is not None)
        wait_until(lambda: metric(http, "dropped_total") == 1)
        assert len(calls) < 900
        assert metric(http, "tokens_generated_total") == 0
        assert http.get("/v1/memories/ada").json()["tokens"] == 0
        assert say(http, "Hello", memory_id="ada") == say(http, "Hello")


@pytest.mark.parametrize("stream", [True, False])
def test_a_server_that_ends_finishes_what_is_on_its_way(stream, tmp_path):
    said = []
    with served(store=str(tmp_path)) as (url, app):
        httpx.post(f"{url}/v1/memories", json={"id": "ada"})
        sent = body("My name is Ada", memory_id="ada", stream=stream, max_tokens=64)
        path = f"{url}/v1/chat/completions"
        asking = threading.Thread(target=lambda: said.append(httpx.post(path, json=sent, timeout=60).text))
        asking.start()
        wait_until(lambda: app.state.worker._current is not None)
    asking.join(20)
    assert said[0].endswith("data: [DONE]\n\n") if stream else json.loads(said[0])["choices"]
    with by_http(store=str(tmp_path)) as (http, _):
        assert http.get("/v1/memories/ada").json()["tokens"] == len("My name is Ada") + 3 + 64


def test_a_worker_that_is_closed_drops_what_waits_and_what_is_on_its_way():
    worker = Worker(Memories(tiny(), letters(), ServeSettings("tiny")), 4)
    worker.start()

    async def told():
        begun = threading.Event()

        def endless(job):
            begun.set()
            while True:
                job.check()

        jobs = [worker.submit(endless) for _ in range(2)]
        await asyncio.to_thread(begun.wait, 20)
        await asyncio.to_thread(worker.close)
        with pytest.raises(ApiError, match="shutting down"):
            worker.submit(endless)
        return [await job.events.get() for job in jobs]

    assert [error.code for error in asyncio.run(asyncio.wait_for(told(), 30))] == ["shutting_down"] * 2
    assert not worker.is_alive


def test_a_long_text_that_nobody_waits_for_is_dropped_at_the_next_sleep():
    with by_http() as (http, app):
        http.post("/v1/memories", json={"id": "ada"})
        content = json.dumps({"text": "abcdefgh " * 20_000}).encode()
        with raw(http, request_of("/v1/memories/ada/read", content)):
            wait_until(lambda: app.state.worker._current is not None and metric(http, "sleeps_total") > 1)
        wait_until(lambda: metric(http, "dropped_total") == 1)
        assert http.get("/v1/memories/ada").json()["tokens"] == 0


def test_a_request_that_fails_fails_alone(monkeypatch, caplog):
    with by_http() as (http, app):
        http.post("/v1/memories", json={"id": "ada"})
        before = say(http, "My name is Ada", memory_id="ada", remember=False)
        with monkeypatch.context() as broken:
            broken.setattr(SleepState, "from_cache", lambda *_: 1 / 0)
            broken.setattr(Memories, "list", lambda *_: 1 / 0)
            monkeypatch.setattr(app.state.worker.memories, "shelf", None)
            assert code(http.post("/v1/chat/completions", json=body("Hi", memory_id="ada")), 500) == "internal_error"
            assert code(http.get("/v1/memories"), 500) == "internal_error"
            with http.stream("POST", "/v1/chat/completions", json=body("Hi", memory_id="ada", stream=True)) as told:
                lines = [line for line in told.iter_lines() if line]
            assert json.loads(lines[-1][6:])["error"]["code"] == "internal_error"
        assert "ZeroDivisionError" in caplog.text
        assert say(http, "My name is Ada", memory_id="ada") == before


def test_logs_have_no_lines_of_clients(caplog):
    caplog.set_level(logging.DEBUG)
    line = "x\r\nERROR: all is lost"
    with by_http() as (http, _):
        http.post("/v1/memories", json={"id": line})
        http.post("/v1/memories", json={"id": "ada"})
        http.post("/v1/memories/ada/read", json={"text": line, "title": line})
        http.get("/v1/memories/x%0d%0aERROR:%20all%20is%20lost")
        http.post("/v1/chat/completions", json=body(line, memory_id=line) | {line: 1, "user": line})
        http.post("/v1/chat/completions", json=body(line, model=line))
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("hf_sleep", "uvicorn"))]
    assert not any("\n" in message for message in ours)


# The hostile.


def test_good_requests_are_right_beside_hostile_ones(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    try:
        from hostile import Attack
    finally:
        sys.path.pop(0)
    session, told = SleepSession(tiny(), letters()), []
    turns = ["My name is Ada", "I sail", "And you", "What is my name"]
    expected = [session.chat(turn, **SAME) for turn in turns]
    with by_http(store=str(tmp_path), seconds_to_send=1.0, max_body_bytes=100_000) as (http, _):
        http.post("/v1/memories", json={"id": "ada"})
        attack = Attack(http.base_url.host, http.base_url.port, NAME, 300, threads=4)
        attack.start()
        for turn in turns:
            told.append(say(http, turn, memory_id="ada"))
        attack.join(120)
        assert told == expected
        assert attack.done == 300
        assert not attack.wrong
        assert http.get("/health").text == "ok\n"
        assert say(http, "My name is Ada") == expected[0]


# The command.


def test_the_command_serves_until_it_is_told_to_end(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    letters().save_pretrained(tmp_path / "model")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [str(tmp_path / "model"), "--port", str(port), "--store", str(tmp_path / "store"), "--name", NAME]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_sleep", "serve", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"HF_SLEEP_TOKENS": "secret other"},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": "Bearer other"}) as http:

            def is_there():
                assert process.poll() is None, process.stdout.read()
                try:
                    return http.get("/health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(is_there, 120)
            http.post("/v1/memories", json={"id": "ada"}).raise_for_status()
            said = say(http, "My name is Ada", memory_id="ada")
            assert code(http.get("/v1/models", headers={"Authorization": "Bearer x"}), 401) == "invalid_api_key"
    finally:
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode in (0, -signal.SIGTERM), output
    assert "Traceback" not in output
    assert "secret" not in output
    with by_http(store=str(tmp_path / "store"), tokens=("other",), token="other") as (http, _):
        session = SleepSession(tiny(), letters())
        assert session.chat("My name is Ada", **SAME) == said
        assert say(http, "What is my name", memory_id="ada") == session.chat("What is my name", **SAME)


@pytest.fixture
def run(monkeypatch):
    """Run the command without a model; gives its settings, how it listens, and what it printed."""
    seen = {}

    def loaded(model, how):
        seen["sleep"] = {name: how[name] for name in SETTINGS if how[name] is not None}
        seen["device"] = how["device"]
        return "model", "tokenizer"

    monkeypatch.setattr("hf_sleep.cli.serve.load_model", loaded)
    monkeypatch.setattr("hf_sleep.serve.app.create_app", lambda *given: seen.update(settings=given[2]))
    monkeypatch.setattr("uvicorn.run", lambda app, **listening: seen.update(listening=listening))

    def invoke(*arguments):
        result = CliRunner().invoke(command, ["serve", "org/model", *arguments], env={"HF_SLEEP_TOKENS": ""})
        return result, seen

    return invoke


def test_the_command_s_options_are_settings(run):
    result, seen = run()
    assert result.exit_code == 0, result.output
    assert seen["settings"] == ServeSettings("model", hosts=("127.0.0.1", "[::1]", "localhost"))
    assert (seen["listening"]["host"], seen["listening"]["port"]) == ("127.0.0.1", 8000)
    assert "Memories end with the server" in result.output
    assert "Warning" not in result.output
    options = "--max-ram 1.5GB --max-memories 2 --ttl 60 --max-body 3kB --max-upload 4MB --max-tokens 5 --max-queue 6"
    more = "--prefixes 7MB --name n --store s --token a --token b --host 0.0.0.0 --port 81 --max-connections 9"
    result, seen = run(*options.split(), *more.split(), "--window-size", "64", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert seen["settings"] == ServeSettings(
        "n", "s", ("a", "b"), (), 1_500_000_000, 2, 60.0, 3000, 4_000_000, 5, max_queue=6, prefix_bytes=7_000_000
    )
    assert seen["sleep"] == {"window_size": 64}
    assert seen["device"] == "cpu"
    assert seen["listening"] | {"host": "0.0.0.0", "port": 81, "limit_concurrency": 9} == seen["listening"]
    assert "Warning" not in result.output


def test_the_command_warns_of_a_server_for_everybody(run):
    result, seen = run("--host", "0.0.0.0")
    assert "Warning: whoever reaches 0.0.0.0 can use this server" in result.output
    assert seen["settings"].hosts == ()


@pytest.mark.parametrize("wrong", [["--max-ram", "much"], ["--max-queue", "0"], ["--prefixes", "1MB"], ["--ttl", "0"]])
def test_the_command_says_what_cannot_be(run, wrong):
    result, _ = run(*wrong)
    assert result.exit_code in (1, 2)
    assert "Traceback" not in result.output
    assert "Error" in result.output or "Invalid" in result.output
