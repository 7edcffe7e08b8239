"""A Hub on this machine, for models that are pushed and loaded over HTTP."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import ModelCard, constants


class StandIn(ThreadingHTTPServer):
    """Acts as the Hub where models are pushed and loaded: repositories with commits, git-LFS, checked metadata."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.branches: dict[str, dict[str, str]] = {}  # repository: branch: commit
        self.commits: dict[str, dict[str, bytes]] = {}  # commit: path: content
        self.messages: list[str] = []
        self.objects: dict[str, bytes] = {}

    def commit(self, repo_id: str, branch: str, files: dict[str, bytes], message: str = "") -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{repo_id}{branch}{len(self.messages)}".encode()).hexdigest()
        self.commits[oid] = files
        self.branches.setdefault(repo_id, {})[branch] = oid
        return oid

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Paths and contents at the head of a branch."""
        return self.commits[self.branches[repo_id][branch]]

    def card(self, repo_id: str, branch: str = "main") -> ModelCard:
        return ModelCard(self.files(repo_id, branch)["README.md"].decode())

    def put(self, repo_id: str, folder: Path) -> None:
        """A repository that somebody else pushed."""
        self.commit(repo_id, "main", {path.name: path.read_bytes() for path in folder.iterdir()})


class Requests(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def reply(self, content: object = b"", status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def missing(self, what: str) -> None:
        self.reply({"error": what}, 404, X_Error_Code=what)

    def handle_any(self) -> None:
        path, data, hub = unquote(urlsplit(self.path).path), self.body(), self.server
        for method, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method:
                groups = match.groupdict()
                repo_id = groups.get("repo")
                if repo_id is not None and repo_id not in hub.branches:
                    return self.missing("RepoNotFound")
                if "rev" in groups:
                    revision = groups["rev"] or "main"
                    groups["commit"] = hub.branches[repo_id].get(revision, revision)
                    if groups["commit"] not in hub.commits:
                        return self.missing("RevisionNotFound")
                return answer(self, data, **groups)
        return self.missing("EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def create(self, data: bytes) -> None:
        asked = json.loads(data)
        repo_id = f"{asked['organization'] or 'me'}/{asked['name']}"
        fresh = repo_id not in self.server.branches
        if fresh:
            self.server.commit(repo_id, "main", {})
        self.reply({"url": f"{self.server.url}/{repo_id}"}, 200 if fresh else 409)

    def validate(self, data: bytes) -> None:
        content = json.loads(data)["content"]
        errors = [{"message": problem} for problem in problems(yaml.safe_load(content.split("---")[1]))]
        self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, _: bytes, repo: str, name: str) -> None:
        fresh = name not in self.server.branches[repo]
        if fresh:
            self.server.commit(repo, name, self.server.files(repo))
        self.reply({}, 200 if fresh else 409)

    def preupload(self, data: bytes, repo: str, rev: str, commit: str) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(data)["files"]
        ]
        self.reply({"files": files})

    def batch(self, data: bytes, repo: str) -> None:
        objects = [
            {**o, "actions": {"upload": {"href": f"{self.server.url}/lfs/{o['oid']}"}}}
            for o in json.loads(data)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, data: bytes, oid: str) -> None:
        assert hashlib.sha256(data).hexdigest() == oid
        self.server.objects[oid] = data
        self.reply()

    def push(self, data: bytes, repo: str, rev: str, commit: str) -> None:
        files, branch = dict(self.server.commits[commit]), rev
        if "create_pr" in parse_qs(urlsplit(self.path).query):
            branch = "refs/pr/1"
        for line in data.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = self.server.commit(repo, branch, files, message)
        url = f"{self.server.url}/{repo}/discussions/1"
        self.reply({"commitUrl": f"{self.server.url}/{repo}/commit/{oid}", "commitOid": oid, "pullRequestUrl": url})

    def info(self, _: bytes, repo: str, rev: str | None, commit: str) -> None:
        siblings = [{"rfilename": path} for path in self.server.commits[commit]]
        self.reply({"id": repo, "sha": commit, "siblings": siblings, "tags": [], "private": False})

    def tree(self, _: bytes, repo: str, rev: str, commit: str) -> None:
        files = self.server.commits[commit].items()
        self.reply(
            [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files
            ]
        )

    def resolve(self, _: bytes, repo: str, rev: str, commit: str, path: str) -> None:
        data = self.server.commits[commit].get(path)
        if data is None:
            self.reply(b"", 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        self.reply(data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=commit)


REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
ROUTES = [
    (["POST"], "/api/repos/create", Requests.create),
    (["POST"], "/api/validate-yaml", Requests.validate),
    (["POST"], rf"/api/models/{REPO}/branch/(?P<name>.+)", Requests.branch),
    (["POST"], rf"/api/models/{REPO}/preupload/(?P<rev>.+)", Requests.preupload),
    (["POST"], rf"/api/models/{REPO}/commit/(?P<rev>.+)", Requests.push),
    (["POST"], rf"/{REPO}\.git/info/lfs/objects/batch", Requests.batch),
    (["PUT"], r"/lfs/(?P<oid>\w+)", Requests.upload),
    (["GET"], rf"/api/models/{REPO}(?:/revision/(?P<rev>.+))?", Requests.info),
    (["GET"], rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)", Requests.tree),
    (["GET", "HEAD"], rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", Requests.resolve),
]
LICENCES = {"apache-2.0", "mit", "llama3.2", "gemma", "other"}


def problems(metadata: dict) -> list[str]:
    """List what the Hub objects to in a card's metadata, as far as its documentation says."""
    found = []
    for key in ("library_name", "pipeline_tag", "license", "license_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            found.append(f'"{key}" must be a string')
    if metadata.get("license", "mit") not in LICENCES:
        found.append('"license" must be one of a list')
    if metadata.get("license") == "other" and "license_name" not in metadata:
        found.append('"license_name" is needed where "license" is "other"')
    if metadata.get("base_model_relation", "finetune") not in ("adapter", "merge", "quantized", "finetune"):
        found.append('"base_model_relation" must be one of a list')
    bases = metadata.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", base):
            found.append(f'"base_model" with value {base!r} is not valid')
    for model in metadata.get("model-index", []):
        for result in model.get("results", []):
            if not {"task", "dataset", "metrics"} <= result.keys() or "type" not in result["task"]:
                found.append('"model-index" lacks a task, a dataset or metrics')
            elif not {"type", "name"} <= result["dataset"].keys():
                found.append('"model-index" has a dataset without type or name')
            elif not all({"type", "value"} <= metric.keys() for metric in result["metrics"]):
                found.append('"model-index" has a metric without type or value')
    return found


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own, and a client that knows no other."""
    with StandIn() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
        monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
        yield server
        server.shutdown()
