"""Sharing, against a local stand-in for the hub that keeps what is committed to it."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from tests.exports.exporting import export_to
from tests.support import start_command, tiny_model


class StandIn(BaseHTTPRequestHandler):
    """The four calls of an upload; every file is taken as a regular one."""

    files: dict
    refuses = False

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.refuses or self.headers.get("Authorization") != "Bearer hf_stand_in":
            return self._answer({"error": "you may not write here"}, 401)
        if self.path == "/api/repos/create":
            return self._answer({"url": f"http://{self.headers['Host']}/me/tiny", "id": "me/tiny"})
        if self.path == "/api/validate-yaml":
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/models/me/tiny/preupload/main":
            asked = json.loads(body)["files"]
            answer = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked]
            return self._answer({"files": answer})
        if self.path == "/api/models/me/tiny/commit/main":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return self._answer(
                {"commitUrl": f"http://{self.headers['Host']}/me/tiny/commit/1", "commitOid": "1", "hookOutput": ""}
            )
        return self._answer({"error": self.path}, 404)

    def _answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    handler = type("Handler", (StandIn,), {"files": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def share(monkeypatch, tmp_path, tokenizer, address, *arguments, check=True):
    info = {"data_dir": "/somewhere/tales", "recipe": {"optimizer": "muon"}, "metrics": {"val/loss": 1.25}}
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer, info)
    for key, value in {"HF_ENDPOINT": address, "HF_TOKEN": "hf_stand_in", "HF_HUB_OFFLINE": "0"}.items():
        monkeypatch.setenv(key, value)
    for proxy in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(proxy, raising=False)
    return start_command("export", "checkpoint=model", *arguments, cwd=tmp_path, check=check)


@pytest.mark.parametrize(
    ("format", "files", "says"),
    [
        (
            ["format=packed"],
            {
                *("config.json", "generation_config.json", "model.safetensors", "export.json"),
                *("tokenizer.model", "tokenizer.json", "tokenizer_config.json"),
            },
            "AutoModelForCausal",
        ),
        (["format=gguf", "type=f16", "out=tiny.gguf"], {"tiny.gguf"}, "llama-cli -hf me/tiny"),
    ],
    ids=["packed", "gguf"],
)
def test_the_export_arrives_with_its_card(monkeypatch, tmp_path, tokenizer, hub, format, files, says):
    handler, address = hub
    (tmp_path / "model-packed").mkdir()
    result = share(monkeypatch, tmp_path, tokenizer, address, *format, "share=me/tiny")
    assert "shared: " in result.stdout
    assert files | {"README.md"} == set(handler.files)
    listed = result.stdout[result.stdout.index("sharing ") : result.stdout.index("shared: ")]
    assert f"sharing {len(files) + 1} files as me/tiny on {address}" in listed
    assert all(f"  {name}  {len(content):,} bytes" in listed for name, content in handler.files.items())
    out = tmp_path / ("tiny.gguf" if "tiny.gguf" in files else "model-packed/model.safetensors")
    assert handler.files[out.name] == out.read_bytes()
    card = handler.files["README.md"].decode()
    assert card.startswith("---\n") and says in card
    for fact in ("tales", "muon", "1.2500", "2 layers, hidden 32", "MB", "checked with"):
        assert fact in card, f"{fact} is missing in:\n{card}"


def test_what_else_lies_in_the_folder_is_not_sent(monkeypatch, tmp_path, tokenizer, hub):
    handler, address = hub
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    export_to(tmp_path / "model-packed", tmp_path / "model", verify=False)
    (tmp_path / "model-packed" / ".env").write_text("SECRET=1")
    (tmp_path / "model-packed" / "notes").mkdir()
    (tmp_path / "model-packed" / "notes" / "diary.txt").write_text("mine")
    share(monkeypatch, tmp_path, tokenizer, address, "verify=false", "share=me/tiny")
    assert "config.json" in handler.files and not {".env", "notes/diary.txt"} & set(handler.files)
    assert (tmp_path / "model-packed" / "notes" / "diary.txt").exists()


def test_who_may_not_write_keeps_the_export_and_hears_how(monkeypatch, tmp_path, tokenizer, hub):
    handler, address = hub
    handler.refuses = True
    result = share(monkeypatch, tmp_path, tokenizer, address, "share=me/tiny", check=False)
    assert result.returncode == 2 and "hf auth login" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "model-packed" / "model.safetensors").is_file() and not handler.files
    result = share(monkeypatch, tmp_path, tokenizer, address, "share=tiny", check=False)
    assert result.returncode == 2 and "owner/name" in result.stderr
