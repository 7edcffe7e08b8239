"""Hostile requests to a server, beside good ones: is every good one right, and does memory stay flat?

python benchmarks/hostile.py [--requests 2000] [--model FOLDER]
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil

TURNS = ("My name is Ada", "I sail on the sea", "And you", "What is my name")
NAME = "hostile"


def question(name: str, text: str, **how: object) -> dict:
    return {"model": name, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 6, **how}


class Attack:
    """Threads that send hostile requests.

    Args:
        host: of the server.
        port: of the server.
        name: of its model.
        count: of requests.
        threads: that send them.
        seed: of what they send.
    """

    def __init__(self, host: str, port: int, name: str, count: int, threads: int = 4, seed: int = 0):
        self.host, self.port, self.name, self.count = host, port, name, count
        self.done, self.wrong = 0, []
        self.statuses: Counter = Counter()
        self._lock, self._random = threading.Lock(), random.Random(seed)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        self._left = count
        self.kinds: list[Callable[[], int | None]] = [
            self.bad_json,
            self.wrong_types,
            self.unknown_names,
            self.huge,
            self.strange_paths,
            self.bad_files,
            self.no_http,
            self.leaves_at_once,
            self.leaves_in_the_body,
            self.reads_slowly,
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._left:
                    return
                self._left -= 1
                kind = self.kinds[self._left % len(self.kinds)]
            status = "no answer"
            with contextlib.suppress(OSError, http.client.HTTPException):
                status = kind() or status
            with self._lock:
                self.done += 1
                self.statuses[status] += 1
                if isinstance(status, int) and (status in (200, 201) or status >= 500) and status != 503:
                    self.wrong.append((kind.__name__, status))

    def ask(self, method: str, path: str, content: bytes = b"", kind: str = "application/json") -> int:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            connection.request(method, path, content, {"Content-Type": kind})
            return connection.getresponse().status
        finally:
            connection.close()

    def chat(self, **how: object) -> int:
        return self.ask("POST", "/v1/chat/completions", json.dumps(question(self.name, "Hello") | how).encode())

    def pick(self, *of: object) -> object:
        with self._lock:
            return self._random.choice(of)

    # The kinds. Each gives the status of its answer, or nothing where it does not wait for one.

    def bad_json(self) -> int:
        content = self.pick(b"{", b"", b"[]", b"\xff\xfe\x00", b"[" * 50_000, b'{"a":' * 20_000, b"1" * 9000, b"NaN")
        return self.ask("POST", "/v1/chat/completions", content)

    def wrong_types(self) -> int:
        wrong = self.pick(None, 3, [], {}, True, "x", -1, 1e308, [None], {"a": {}}, 2**70, "\ud800", [[]])
        field = self.pick("messages", "max_tokens", "temperature", "stop", "stream", "seed", "memory_id", "remember")
        body = {"messages": [{"role": wrong, "content": wrong}]} | {field: wrong}
        return self.chat(**body)

    def unknown_names(self) -> int:
        return self.chat(**{str(self.pick("__proto__", "a\r\nb", "x" * 5000, "", "min_p", "\x00")): 1})

    def huge(self) -> int | None:
        size = 50_000_000
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
        with self.connected() as to:
            to.sendall(head.encode() + b"x" * 10_000)
            return self.status(to)

    def strange_paths(self) -> int:
        path = self.pick(
            "/../../etc/passwd", "/v1/memories/..%2f..%2fx", "/v1/memories/%00", "/v1/memories/" + "a" * 999
        )
        return self.ask(str(self.pick("GET", "PUT", "DELETE", "POST", "PATCH")), str(path), b"{}")

    def bad_files(self) -> int:
        content = self.pick(b"", b"\xff" * 99, (10**8).to_bytes(8, "little") + b" " * 50_000, os.urandom(50_000))
        return self.ask("PUT", "/v1/memories/hostile/file", content, "application/octet-stream")

    def no_http(self) -> int | None:
        with self.connected(seconds=1) as to:
            to.sendall(self.pick(b"\x00" * 500, b"GET / HTTP/9.9\r\n\r\n", b"GET /\r\n" * 50, b"\x16\x03\x01" * 99))
            return self.status(to)

    def leaves_at_once(self) -> None:
        content = json.dumps(question(self.name, "Hello", stream=bool(self.pick(True, False)), max_tokens=64)).encode()
        with self.connected() as to:
            to.sendall(self.head(len(content)) + content)
            if self.pick(True, False):
                time.sleep(0.02)

    def leaves_in_the_body(self) -> None:
        with self.connected() as to:
            to.sendall(self.head(500) + b'{"model": ')

    def reads_slowly(self) -> None:
        content = json.dumps(question(self.name, "Hello", stream=True, max_tokens=64)).encode()
        with self.connected() as to:
            to.sendall(self.head(len(content)) + content)
            for _ in range(5):
                to.recv(1)
                time.sleep(0.05)

    def head(self, length: int) -> bytes:
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        return f"{head}Content-Length: {length}\r\n\r\n".encode()

    def connected(self, seconds: float = 60) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=seconds)

    @staticmethod
    def status(to: socket.socket) -> int | None:
        answer = to.recv(100)
        return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else None


def tiny(folder: Path) -> None:
    """Write a small random model, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from hf_sleep import SleepConfig, SleepForCausalLM

    torch.manual_seed(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=None, eos_token_id=None, **sizes))
    SleepForCausalLM.from_base(base, SleepConfig(window_size=64, sleep_passes=2)).save_pretrained(folder)


class Good:
    """Conversations, each with a memory of its own, whose answers must be those of the first."""

    def __init__(self, port: int):
        self.port, self.asked, self.wrong = port, 0, []
        self.expected = self.conversation("first")

    def call(self, method: str, path: str, body: dict | None = None) -> dict:
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
            try:
                connection.request(method, path, json.dumps(body or {}), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                content = json.loads(answer.read())
            finally:
                connection.close()
            if answer.status != 503:  # the queue is full: the server says when to come again
                assert answer.status < 300, content
                return content
            time.sleep(0.1)

    def conversation(self, id: str) -> list[str]:
        self.call("POST", "/v1/memories", {"id": id})
        bodies = [question(NAME, turn, memory_id=id) for turn in TURNS]
        answers = [self.call("POST", "/v1/chat/completions", body) for body in bodies]
        self.call("DELETE", f"/v1/memories/{id}")
        return [answer["choices"][0]["message"]["content"] for answer in answers]

    def one(self) -> None:
        said = self.conversation(f"good-{self.asked}")
        self.asked += len(TURNS)
        if said != self.expected:
            self.wrong.append(said)


def started(model: str, port: int, store: str) -> subprocess.Popen:
    arguments = [model, "--port", str(port), "--name", NAME, "--store", store, "--max-body", "1MB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_sleep", "serve", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while True:
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return process
        time.sleep(0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--model", help="folder; by default a small random model")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        if options.model is None:
            tiny(Path(folder) / "model")
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        process = started(options.model or f"{folder}/model", port, f"{folder}/store")
        try:
            measured(process, port, options.requests)
        finally:
            process.terminate()
            process.wait(60)


def measured(process: subprocess.Popen, port: int, count: int) -> None:
    good, server, began = Good(port), psutil.Process(process.pid), time.monotonic()
    parts, sizes, statuses, wrong = 10, [], Counter(), []
    for part in range(parts):
        attack = Attack("127.0.0.1", port, NAME, count // parts, threads=8, seed=part)
        attack.start()
        while attack.done < attack.count:
            good.one()
        statuses, wrong = statuses + attack.statuses, wrong + attack.wrong
        sizes.append(server.memory_info().rss / 1e6)
        print(f"{(part + 1) * attack.count:5} hostile requests, {sizes[-1]:.0f} MB", flush=True)
    told = ", ".join(f"{status}: {number}" for status, number in sorted(statuses.items(), key=str))
    print(f"statuses of the hostile: {told}")
    print(f"hostile ones that were served, or broke something: {wrong or 'none'}")
    print(f"good requests: {good.asked}, wrong: {len(good.wrong)}; {time.monotonic() - began:.0f} s")
    print(
        f"resident memory: {sizes[1]:.0f} MB after {2 * count // parts} hostile requests, {sizes[-1]:.0f} MB at the end"
    )
    sys.exit(bool(wrong or good.wrong or process.poll() is not None))


if __name__ == "__main__":
    main()
