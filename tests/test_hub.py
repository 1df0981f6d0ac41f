"""Models and data sets by name: our code against a hub on the loopback.

The server speaks the part of the Hugging Face hub's protocol that downloads need. As on the
real hub, weights come from another host, to which files redirect (here: another name of the
same one)."""

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, file_download, save_torch_state_dict
from safetensors.torch import load_file
from test_model import parameters_of, refusal, write_model

import model as model_module
from model import NAMES, load, save
from tasks import load_rows

ROOT = Path(model_module.__file__).parent
COMMIT = "c0ffee" * 6 + "abcd"
WEIGHTS = "model.safetensors"
OURS = {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


class Hub(ThreadingHTTPServer):
    """repos: "models/owner/name" or "datasets/owner/name" -> {path: content}. What may go
    wrong: refuse_repo, refuse_files: (status, code, message); gone: paths that are listed
    but not there; send: {path: content that is sent instead}; cuts: {path: how many answers
    end in the middle}; portal: a page that answers everything."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.gone, self.send, self.cuts = {}, set(), {}, {}
        self.refuse_repo = self.refuse_files = self.portal = None
        self.requests = []  # (method, path, headers)
        self.fetched = []  # paths of files whose content was sent, or begun to be
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.shutdown()
        self.server_close()
        huggingface_hub.close_session()  # it may hold open connections


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        hub.requests.append((self.command, path, self.headers))
        if hub.portal:
            self.answer(200, hub.portal)
        elif m := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(/revision/main)?", path):
            self.repository(m[1])
        elif m := re.fullmatch(rf"/api/(\w+/[^/]+/[^/]+)/tree/{COMMIT}", path):
            files = hub.repos[m[1]].items()
            self.json(
                [dict(type="file", path=p, size=len(b), oid=etag(b)) for p, b in files]
            )
        elif m := re.fullmatch(rf"/(datasets/)?([^/]+/[^/]+)/resolve/{COMMIT}/(.+)", path):
            self.file((m[1] or "models/") + m[2], unquote(m[3]))
        elif m := re.fullmatch(r"/stored/(\w+/[^/]+/[^/]+)/(.+)", path):
            self.content(m[1], unquote(m[2]))
        else:
            self.answer(404)

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def json(self, data, status=200, **headers):
        self.answer(
            status, json.dumps(data).encode(), Content_Type="application/json", **headers
        )

    def refuse(self, status, code, message):
        headers = {"X_Error_Code": code, "X_Error_Message": message}
        self.json({"error": message}, status, **{k: v for k, v in headers.items() if v})

    def repository(self, name):
        if self.server.refuse_repo:
            return self.refuse(*self.server.refuse_repo)
        if name not in self.server.repos:  # the hub does not tell missing from private
            return self.refuse(401, "RepoNotFound", "Repository not found")
        siblings = [{"rfilename": path} for path in self.server.repos[name]]
        self.json({"id": name.partition("/")[2], "sha": COMMIT, "siblings": siblings})

    def file(self, name, path):
        hub, content = self.server, self.server.repos[name].get(path)
        if hub.refuse_files:
            return self.refuse(*hub.refuse_files)
        if content is None or path in hub.gone:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        if not path.endswith(".safetensors"):
            return self.content(name, path)
        place = f"http://localhost:{hub.server_port}/stored/{name}/{path}"
        linked = {"X_Linked_ETag": f'"{etag(content)}"', "X_Linked_Size": len(content)}
        self.answer(
            302, ETag='"of-the-pointer"', X_Repo_Commit=COMMIT, Location=place, **linked
        )

    def content(self, name, path):
        hub, whole = self.server, self.server.repos[name][path]
        headers = {
            "X_Repo_Commit": COMMIT,
            "ETag": f'"{etag(whole)}"',
            "Accept_Ranges": "bytes",
        }
        if self.command == "HEAD":
            return self.answer(200, whole, **headers)
        hub.fetched.append(path)
        whole, status, start = hub.send.get(path, whole), 200, 0
        if m := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or ""):
            status, start = 206, int(m[1])
            headers["Content_Range"] = f"bytes {start}-{len(whole) - 1}/{len(whole)}"
        body = whole[start:]
        headers["Content_Length"] = len(body)
        if hub.cuts.get(path):
            hub.cuts[path] -= 1
            body, self.close_connection = body[: len(body) // 2], True
        self.answer(status, body, **headers)


def etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def contents(folder) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small model's folder, with what a repository on the hub holds besides."""
    folder = tmp_path_factory.mktemp("source")
    write_model(folder, hidden_size=64, intermediate_size=192, max_position_embeddings=4096)
    (folder / "README.md").write_text("# A model card")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "original").mkdir()
    (folder / "original" / WEIGHTS).write_bytes(b"another copy")
    return folder


@pytest.fixture
def hub(source, tmp_path, monkeypatch):
    """A hub with the model owner/name, and an empty cache. huggingface_hub read the
    environment when it was imported, so its constants are set; tests at the end set the
    environment itself."""
    server = Hub()
    server.repos["models/owner/name"] = contents(source)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield server
    server.stop()


def same(decoder, folder) -> bool:
    weights, loaded = load_file(folder / WEIGHTS), parameters_of(decoder)
    if weights.keys() != loaded.keys():
        return False
    return all(torch.equal(weights[name], loaded[name]) for name in loaded)


def no_waiting(monkeypatch):
    monkeypatch.setattr(
        file_download.time, "sleep", lambda seconds: None
    )  # between its retries


# ---- what is fetched


def test_model_by_name_is_not_the_model_in_the_folder(hub, source):
    """A file that was mixed up with another, or whose bytes were changed on the way."""
    decoder, chat = load("owner/name")
    assert same(decoder, source) and len(hub.repos["models/owner/name"][WEIGHTS]) > 300_000
    assert chat.files["tokenizer.json"] == (source / "tokenizer.json").read_bytes()


def test_pickles_cards_and_second_copies_are_fetched_too(hub):
    """Repositories hold the weights in several forms: a download several times too
    large."""
    load("owner/name")
    assert Counter(hub.fetched) == Counter(OURS)
    asked = {path.rpartition(COMMIT)[2] for _, path, _ in hub.requests}
    assert not asked & {"/README.md", "/pytorch_model.bin", "/original/model.safetensors"}


def test_shards_or_their_index_are_left_out(hub, source, tmp_path, monkeypatch):
    """Large models keep their weights in model-*.safetensors and say in an index which is
    where."""
    small = partial(save_torch_state_dict, max_shard_size=100_000)
    monkeypatch.setattr(model_module, "save_torch_state_dict", small)
    save(*load(str(source)), tmp_path / "sharded")
    hub.repos["models/owner/large"] = contents(tmp_path / "sharded")
    assert sum(path.startswith("model-") for path in hub.repos["models/owner/large"]) > 2
    assert same(load("owner/large")[0], source)


def test_short_name_goes_another_way(hub, source):
    """The table of names points to a repository, which must then be asked for like any
    other."""
    hub.repos = {f"models/{NAMES['qwen2.5-0.5b']}": contents(source)}
    assert same(load("qwen2.5-0.5b")[0], source)
    assert set(hub.fetched) == OURS


def test_model_that_has_pickles_only(hub):
    """Nothing is fetched for the weights, and what follows must say why, not trace back."""
    del hub.repos["models/owner/name"][WEIGHTS]
    assert "no pickle is read" in refusal(load, "owner/name")
    assert set(hub.fetched) == OURS - {WEIGHTS}


def test_token_is_lost_or_shown_to_strangers(hub, monkeypatch):
    """Every request to the hub bears HF_TOKEN; the host that stores the weights never sees
    it."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    load("owner/name")
    seen = {(h["Host"].split(":")[0], h["Authorization"]) for _, path, h in hub.requests
            if "owner/name" in path}  # fmt: skip
    assert seen == {("127.0.0.1", "Bearer hf_secret"), ("localhost", None)}


def test_dataset_file_in_a_folder_of_its_repository(hub):
    """owner/name:path/in/it.json is one file: the rest of the data set is not fetched."""
    rows = [{"nums": [1, 2, 3], "target": 6}, {"nums": [2, 2, 5], "target": 9}]
    files = {"path/in/it.json": json.dumps(rows).encode(), "path/in/other.json": b"[]"}
    hub.repos["datasets/owner/data"] = files
    assert load_rows("owner/data:path/in/it.json") == rows
    assert hub.fetched == ["path/in/it.json"]
    assert "does not exist" in refusal(load_rows, "owner/data:path/in/its.json")
    assert hub.fetched == ["path/in/it.json"]


# ---- the cache


def test_every_run_downloads_anew(hub, source):
    """The second load asks the hub for the commit, and for no file: neither content nor
    header."""
    load("owner/name")
    hub.fetched.clear(), hub.requests.clear()
    assert same(load("owner/name")[0], source)
    assert hub.fetched == [] and not any("resolve" in path for _, path, _ in hub.requests)


@pytest.mark.parametrize(
    "how", ["HF_HUB_OFFLINE", "hub is gone", "hub is ill", "token expired"]
)
def test_cached_model_needs_the_hub(hub, source, monkeypatch, how):
    """Whatever ails the hub: what was downloaded once can be loaded."""
    load("owner/name")
    if how == "hub is gone":
        hub.stop()
    elif how == "hub is ill":
        hub.refuse_repo = 503, None, "out of order"
    elif how == "token expired":
        hub.refuse_repo = 401, None, "Invalid credentials in Authorization header"
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert same(load("owner/name")[0], source)
    assert how != "HF_HUB_OFFLINE" or hub.requests == []


# ---- transfers that break


def test_broken_connection_spoils_the_file_or_starts_it_over(hub, source, monkeypatch):
    """Within one call huggingface_hub goes on where it stopped, in steps of its chunks (10
    MB; smaller here), by a Range request. It waits a second before that."""
    no_waiting(monkeypatch)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.cuts[WEIGHTS] = 2
    assert same(load("owner/name")[0], source)
    ranges = [
        h["Range"] for m, path, h in hub.requests if m == "GET" and path.endswith(WEIGHTS)
    ]
    assert len(ranges) == 3 and ranges[0] is None
    first, second = (int(r.removeprefix("bytes=").removesuffix("-")) for r in ranges[1:])
    assert 0 < first < second and first % 50_000 == 0


def test_download_that_failed_begins_from_nothing(hub, source, monkeypatch):
    """After five fruitless retries huggingface_hub gives up. The next call keeps the files
    that were complete; of the broken one nothing is kept, since it resumes within a call
    only."""
    no_waiting(monkeypatch)
    hub.cuts[WEIGHTS] = 99
    sentence = refusal(load, "owner/name")
    assert hub.url in sentence and "network" in sentence and "peer closed" in sentence
    assert hub.fetched.count(WEIGHTS) > 1
    hub.cuts.clear(), hub.fetched.clear()
    assert same(load("owner/name")[0], source)
    assert hub.fetched == [WEIGHTS]


def test_half_a_download_is_taken_for_a_model(hub, monkeypatch):
    """The hub goes away in the middle: what is in the cache by then is no model."""
    no_waiting(monkeypatch)
    hub.cuts[WEIGHTS] = 99
    refusal(load, "owner/name")
    hub.stop()
    assert hub.url in refusal(load, "owner/name")


@pytest.mark.parametrize("change", [-1000, 1000])
def test_content_of_another_length_is_kept(hub, source, change):
    """huggingface_hub compares the length with the one announced; nothing wrong gets
    cached."""
    weights = hub.repos["models/owner/name"][WEIGHTS]
    hub.send[WEIGHTS] = weights[:change] if change < 0 else weights + bytes(change)
    sentence = refusal(load, "owner/name")
    assert f"should be of size {len(weights)}" in sentence
    hub.send.clear()
    assert same(load("owner/name")[0], source)


def test_damaged_header_of_the_right_length_is_read(hub, source):
    """huggingface_hub computes no checksum: the damage passes it, but not our reader. It
    stays in the cache until the repository's whole folder there is removed, not only its
    snapshot."""
    weights = hub.repos["models/owner/name"][WEIGHTS]
    hub.send[WEIGHTS] = b"<html>".ljust(100) + weights[100:]
    sentence = refusal(load, "owner/name")
    assert "damaged" in sentence and constants.HF_HUB_CACHE in sentence
    hub.send.clear()
    cached = Path(constants.HF_HUB_CACHE) / "models--owner--name"
    shutil.rmtree(cached / "snapshots")
    assert "damaged" in refusal(load, "owner/name")
    shutil.rmtree(cached)
    assert same(load("owner/name")[0], source)


def test_what_nothing_catches_flipped_bits_in_the_numbers(hub, source):
    """Not a virtue but a limit, kept here so that nobody believes otherwise: content of the
    right length with a sound header loads. Neither huggingface_hub nor safetensors has a
    checksum."""
    weights = hub.repos["models/owner/name"][WEIGHTS]
    hub.send[WEIGHTS] = weights[:-4] + bytes(b ^ 1 for b in weights[-4:])
    assert not same(load("owner/name")[0], source)


# ---- refusals: what the user is told


GATED = "Access is restricted. You must be authenticated to have it."


def advice(hub, kind="model", name="owner/name") -> str:
    return f"the {kind} {name} could not be fetched from {hub.url}; check the "


@pytest.mark.parametrize("status", [401, 403])  # no token; the terms are not accepted
@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_gated_repository_hides_that_it_is(hub, status, kind):
    """On the hub a gated repository can be listed by all; only its files are refused."""
    hub.repos["datasets/owner/data"] = {"rows.json": b"[]"}
    hub.refuse_files = status, "GatedRepo", GATED
    if kind == "model":
        sentence = refusal(load, "owner/name")
        assert sentence.startswith(advice(hub))
    else:
        sentence = refusal(load_rows, "owner/data:rows.json")
        assert sentence.startswith(advice(hub, "dataset", "owner/data"))
    assert "GatedRepoError" in sentence and GATED.rstrip(".") in sentence


@pytest.mark.parametrize("name", ["owner/nmae", "owner/name--x"])
def test_wrong_name_is_a_traceback(hub, name):
    """The hub answers 401 for what is missing as for what is private; the second name never
    leaves this machine."""
    assert refusal(load, name).startswith(advice(hub, name=name))


WORDS = "Invalid credentials in Authorization header"


@pytest.mark.parametrize(
    "status, words", [(401, WORDS), (403, "no right"), (503, "no disk")]
)
def test_the_hubs_own_reason_is_lost(hub, status, words, monkeypatch):
    """An expired token is refused even for what is public; a hub that is ill says so."""
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    hub.refuse_repo = status, None, words
    sentence = refusal(load, "owner/name")
    assert sentence.startswith(advice(hub)) and words in sentence


def test_file_that_is_listed_but_not_there(hub):
    """A mirror with holes: the file is named, and no model is made of the rest."""
    hub.gone.add("config.json")
    sentence = refusal(load, "owner/name")
    assert hub.url in sentence and "/config.json" in sentence and "Entry" in sentence


def test_login_page_of_a_network_is_a_traceback(hub):
    """What answers is no hub: a hotel's page, or a wrong address in HF_ENDPOINT."""
    hub.portal = b"<html>Please log in</html>"
    assert refusal(load, "owner/name").startswith(advice(hub))


@pytest.mark.parametrize("offline", [False, True])
def test_no_hub_and_no_cache_leaves_one_guessing(hub, monkeypatch, offline):
    """The sentence says where the hub was sought, and what works without one."""
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    sentence = refusal(load, "owner/name")
    assert hub.url in sentence and "network" in sentence and "local path" in sentence
    assert ("HF_HUB_OFFLINE" in sentence) == offline


def test_full_disk_is_a_traceback(hub, monkeypatch, tmp_path):
    """Both ways: no room in the middle of a file, and a cache that cannot be made."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(file_download, "http_get", full)
        sentence = refusal(load, "owner/name")
        assert "No space left" in sentence and "the disk" in sentence
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    assert f"{tmp_path}/file/cache" in refusal(load, "owner/name")


# ---- a whole program, as a user's shell starts it


def python(hub, home, *arguments, **environment):
    base = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    base |= {"HF_HOME": str(home / "home"), "HF_ENDPOINT": hub.url}
    return subprocess.run(
        [sys.executable, *arguments],
        env=base | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_program_reads_another_endpoint_cache_or_token(hub, tmp_path):
    """The tests above set huggingface_hub's constants; here it is the environment, with no
    more of its variables than these: all else is as huggingface_hub has it by default."""
    limits = [
        "--attempt_tokens=4",
        "--reflection_tokens=144",
        "--retry_tokens=4",
        "--eval_n=1",
    ]
    arguments = ["eval.py", "--model=owner/name", f"--out={tmp_path / 'out'}", *limits]
    done = python(hub, tmp_path, *arguments, HF_TOKEN="hf_secret")
    assert done.returncode == 0 and "owner/name: 0.1 M weights" in done.stdout, done.stderr
    assert (tmp_path / "out" / "eval.json").is_file()
    assert Counter(hub.fetched) == Counter(OURS)
    assert any(
        headers["Authorization"] == "Bearer hf_secret" for _, _, headers in hub.requests
    )

    hub.requests.clear()
    script = "import model; model.load('owner/name')"
    done = python(hub, tmp_path, "-c", script, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and hub.requests == [], done.stderr


def test_program_ends_in_a_traceback(hub, tmp_path):
    """What a user sees of a gated model: one sentence, after the bars of what was begun."""
    hub.refuse_files = 401, "GatedRepo", GATED
    done = python(
        hub, tmp_path, "eval.py", "--model=owner/name", f"--out={tmp_path / 'out'}"
    )
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    last = done.stderr.strip().split("\n")[-1]
    assert last.startswith(f"eval.py: {advice(hub)}") and "GatedRepoError" in last
