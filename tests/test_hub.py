"""A hub id is served like its folder: only the needed files are fetched, once per machine, and later from the cache."""

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
from safetensors.torch import load_file, save_file

from model.checkpoint import needed_shards
from model.config import ModelConfig
from scripts.tools.demo import free_port
from tests.deployment import run
from tests.processes import Job, Process

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "some-org/Tiny-1.5"
ASKED = ("--prompt", "In the beginning", "--max-tokens", "4")
MTP = {"model.layers.5.eh_proj.weight": "mtp.safetensors", "model.layers.5.enorm.weight": "mtp.safetensors"}


class Hub:
    """The routes of the hub that huggingface_hub uses, for one repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.got, self.api = folder, [], 0
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                status, body, headers = hub.answer(unquote(self.path.split("?")[0]), self.headers.get("Authorization"))
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    if "/resolve/" in self.path:
                        hub.got.append(self.path.rsplit("/", 1)[1])
                    self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, path: str, authorization: str | None) -> tuple[int, bytes, dict[str, str]]:
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        if path.startswith("/api/models/"):
            self.api += 1
            name, _, rest = path.removeprefix("/api/models/").replace("/tree/", "/revision/").partition("/revision/")
            if name == "some-org/gated" and authorization != "Bearer sesame":
                return 403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            if name not in (REPO, "some-org/gated"):
                return 404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            if rest not in ("main", "v1.0", COMMIT):
                return 404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"}
            if "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                return 200, json.dumps(tree).encode(), {"Content-Type": "application/json"}
            about = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            return 200, json.dumps(about).encode(), {"Content-Type": "application/json"}
        data = files.get(path.rsplit("/", 1)[1])
        if data is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        return 200, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT}

    def took(self) -> list[str]:
        """Return the files that were fetched since the last call."""
        got, self.got, self.api = sorted(self.got), [], 0
        return got

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def folder(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model in two shards, and what else a repository has."""
    folder = tmp_path_factory.mktemp("repository")
    shutil.copytree(tiny, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(tiny / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.5.")}
    halves = [dict(list(kept.items())[at::2]) for at in range(2)]
    index = dict(MTP)
    for number, half in enumerate(halves):
        save_file(half, folder / f"half-{number}.safetensors")
        index |= dict.fromkeys(half, f"half-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for name in ("mtp.safetensors", "pytorch_model.bin", "modeling.py", "generation_config.json", "figure.png"):
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[Hub]:
    hub = Hub(folder)
    yield hub
    hub.close()


def test_a_job_that_drafts_needs_the_shard_of_its_layer(folder: Path) -> None:
    config, index = ModelConfig.from_pretrained(folder), folder / "model.safetensors.index.json"
    assert needed_shards(index, config) == ["half-0.safetensors", "half-1.safetensors"]
    assert needed_shards(index, config.drafting()) == ["half-0.safetensors", "half-1.safetensors", "mtp.safetensors"]


TEXTS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
WEIGHTS = ["half-0.safetensors", "half-1.safetensors", "model.safetensors.index.json"]


def call(hub: str, home: Path, model: str, *flags: str, ranks: int = 1, **env: str) -> tuple[int, str, str]:
    env = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "0"} | env
    job = Job(["--model", model, *ASKED, *flags], ranks, env=env)
    return job.finish()


def test_the_needed_files_are_fetched_once_and_then_served_from_the_cache(hub: Hub, tmp_path: Path, tiny: Path) -> None:
    code, out, err = call(hub.url, tmp_path, REPO, ranks=2)
    assert code == 0 and "Traceback" not in err, err
    assert out == run("--model", str(tiny), *ASKED)[1]
    assert hub.took() == sorted(TEXTS + WEIGHTS), "each once, though there are two ranks; no more"
    code, again, err = call(hub.url, tmp_path, f"{REPO}@v1.0")
    assert (code, again, hub.took()) == (0, out, []), err
    hub.close()
    code, again, err = call(hub.url, tmp_path, REPO)  # nobody answers
    assert (code, again) == (0, out), err
    code, again, err = call(hub.url, tmp_path, REPO, ranks=2, HF_HUB_OFFLINE="1")
    assert (code, again) == (0, out), err


def test_no_weights_are_fetched_where_none_are_needed(hub: Hub, tmp_path: Path) -> None:
    code, _, err = call(hub.url, tmp_path / "dummy", REPO, "--load", "dummy")
    assert code == 0 and hub.took() == TEXTS, err
    flags = ("--role", "router", "--router", f"127.0.0.1:{free_port()}")
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "router"), "HF_HUB_OFFLINE": "0"}
    router = Process(["--model", REPO, *ASKED, *flags], env=env)
    router.until("router: listening on")
    router.end()
    assert hub.took() == TEXTS


def test_an_error_is_one_line(hub: Hub, tmp_path: Path) -> None:
    nobody, cases = f"http://127.0.0.1:{free_port()}", []
    cases += [
        (hub.url, "some-org/none", f"there is no such folder, and no such model at {hub.url}, or HF_TOKEN may not")
    ]
    cases += [(hub.url, "some-org/gated", f"{hub.url}/some-org/gated is gated: ask for access there, and set HF_TOKEN")]
    cases += [(hub.url, f"{REPO}@v9", f"{hub.url}/{REPO} has no revision v9")]
    cases += [
        (nobody, REPO, f"there is no such folder, and not all of it is in the cache .* \\({nobody} cannot be reached")
    ]
    for at, model, why in cases:
        code, _, err = call(at, tmp_path, model)
        assert code == 2 and "Traceback" not in err, err
        last = err.strip().splitlines()[-1]
        assert last.startswith(f"run.py: error: --model {model}: ") and why.split(" .* ")[0] in last, err
        assert why.split(" .* ")[-1].replace("\\", "") in last, err
    code, _, err = call(hub.url, tmp_path, REPO, ranks=2, HF_HUB_OFFLINE="1")
    assert code == 2 and err.count("run.py: error: ") == 1 and "HF_HUB_OFFLINE is set" in err, err
    assert call(hub.url, tmp_path, "some-org/gated", "--load", "dummy", HF_TOKEN="sesame")[0] == 0
