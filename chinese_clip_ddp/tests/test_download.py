"""Downloads go on where the server broke off and are checked; what is unpacked stays inside, and goes on as well."""

import hashlib
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

import unpack
from list_files import check_path
from unpack import UserError

RECIPE = Path(__file__).parent.parent
SIZE = 300_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class BreakingServer(http.server.BaseHTTPRequestHandler):
    """Files by their address; the first answer for each large one ends in the middle."""

    files, asked, tokens, ranges = {}, [], [], True

    def do_GET(self):
        path = self.path.partition("?")[0]
        data, given = self.files.get(path), self.headers.get("Range")
        self.asked.append((path, given))
        self.tokens.append(self.headers.get("Authorization"))
        if data is None:
            return self.send_error(404)
        start = int(given.removeprefix("bytes=").rstrip("-")) if given and self.ranges else 0
        if start >= len(data) > 0:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        first = len([one for one, _ in self.asked if one == path]) == 1
        self.wfile.write(data[start : start + SIZE // 2] if first and len(data) > 100_000 else data[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    class Handler(BreakingServer):
        files, asked, tokens = {}, [], []

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
    thread.start()
    Handler.address = f"http://127.0.0.1:{listening.server_port}"
    yield Handler
    listening.shutdown()
    thread.join()
    listening.server_close()


def run(script: str, *arguments, **variables) -> subprocess.CompletedProcess:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | variables
    command = ["bash", str(RECIPE / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


@pytest.mark.parametrize(
    ("script", "kind", "prefix"), [("dl_dataset.sh", "datasets", "/datasets"), ("dl_model.sh", "models", "")]
)
def test_a_repository_of_a_hub(server, tmp_path, script, kind, prefix):
    large, small = os.urandom(SIZE), "说明".encode()
    entries = [
        {"type": "directory", "path": "图"},
        {"type": "file", "path": "图/a 1.tar", "lfs": {"oid": sha256(large)}},
        {"type": "file", "path": "README.md"},
    ]
    server.files[f"/api/{kind}/me/it/tree/main"] = json.dumps(entries).encode()
    server.files[f"{prefix}/me/it/resolve/main/%E5%9B%BE/a%201.tar"] = large
    server.files[f"{prefix}/me/it/resolve/main/README.md"] = small
    found = run(script, "me/it", tmp_path / "my", HF_ENDPOINT=server.address, HF_TOKEN="secret")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == ["图/a 1.tar: SHA-256 is right", "README.md: no SHA-256 known"]
    assert (tmp_path / "my/图/a 1.tar").read_bytes() == large and (tmp_path / "my/README.md").read_bytes() == small
    ranges = [given for path, given in server.asked if path.endswith(".tar")]
    assert ranges == [None, f"bytes={SIZE // 2}-"] and set(server.tokens) == {"Bearer secret"}
    again = run(script, "me/it", tmp_path / "my", "*.md", HF_ENDPOINT=server.address)
    assert again.stdout.splitlines() == ["README.md: there already"]
    none = run(script, "me/it", tmp_path / "my", "*.safetensor", HF_ENDPOINT=server.address)
    assert none.returncode == 1 and "me/it has no file that is called *.safetensor" in none.stderr


def test_a_folder_of_any_server_by_its_checksums(server, tmp_path):
    data = os.urandom(SIZE)
    server.ranges = False
    server.files |= {"/d/SHA256SUMS": f"{sha256(data)}  ./a.bin\n{sha256(b'other')} *b.bin\n".encode()}
    server.files |= {"/d/a.bin": data, "/d/b.bin": b"wrong"}
    found = run("dl_dataset.sh", f"{server.address}/d", tmp_path / "my", HF_TOKEN="secret")
    assert found.returncode == 1 and found.stdout.splitlines() == ["a.bin: SHA-256 is right"]
    assert "b.bin: wrong SHA-256, once more" in found.stderr and "b.bin can't be downloaded" in found.stderr
    assert sorted(path.name for path in (tmp_path / "my").iterdir()) == ["a.bin"]
    assert (tmp_path / "my/a.bin").read_bytes() == data and set(server.tokens) == {None}
    server.files["/d/b.bin"] = b"other"
    (tmp_path / "my/b.bin.part").write_bytes(b"ot")  # of a run that was killed
    assert run("dl_dataset.sh", f"{server.address}/d", tmp_path / "my").returncode == 0
    assert (tmp_path / "my/b.bin").read_bytes() == b"other"


def test_what_is_not_there_and_names_that_lead_outside(server, tmp_path):
    found = run("dl_model.sh", "me/none", tmp_path / "my", HF_ENDPOINT=server.address)
    assert found.returncode == 1 and "404" in found.stderr and "Traceback" not in found.stderr
    found = run("dl_model.sh", "me/it", tmp_path / "my", HF_ENDPOINT="http://127.0.0.1:9")  # where nothing listens
    assert found.returncode == 1 and "127.0.0.1 can't be reached" in found.stderr and "HF_ENDPOINT" in found.stderr
    for path in ("../evil", "/etc/evil", "a/../../evil", "a\nb"):
        with pytest.raises(UserError, match="outside of the folder"):
            check_path(path)


def write_archive(path: Path, members: dict[str, bytes]) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, data in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("name", ["d.tar", "d.tar.gz", "d.zip"])
def test_archives_are_unpacked_and_nothing_lands_outside(tmp_path, name):
    (tmp_path / "in/link").parent.mkdir()
    (tmp_path / "in/link").symlink_to(tmp_path)
    members = {"图/a.jpg": b"1" * 50, "../evil": b"x", "b/../../evil": b"x", "link/evil": b"x", "c.d.txt": b"3"}
    archive = write_archive(tmp_path / name, members)
    found = run("unzip_data.sh", archive, tmp_path / "in")
    assert found.returncode == 1 and "2 files written" in found.stdout and "3 members were left out" in found.stderr
    assert (tmp_path / "in/图/a.jpg").read_bytes() == b"1" * 50 and (tmp_path / "in/c.d.txt").read_bytes() == b"3"
    assert not list(tmp_path.rglob("evil")) and not list(tmp_path.parent.glob("evil"))


def test_links_in_a_tar_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "d.tar", "w") as archive:
        for name, kind in (("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    assert unpack.unpack(str(tmp_path / "d.tar"), str(tmp_path / "in")) == (
        0,
        0,
        ["s: a link or a device", "h: a link or a device"],
    )


@pytest.mark.parametrize("name", ["d.tar", "d.tar.gz"])
def test_a_second_start_goes_on_behind_an_archive_that_was_cut_off(tmp_path, name):
    members = {f"{number}.bin": os.urandom(20_000) for number in range(10)}
    whole = write_archive(tmp_path / name, members).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off .*Download it again; 4 files are unpacked|5 files are unpacked"):
        unpack.unpack(str(tmp_path / name), str(tmp_path / "in"))
    done = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "in").glob("*.bin")}
    (tmp_path / name).write_bytes(whole)
    written, there, left_out = unpack.unpack(str(tmp_path / name), str(tmp_path / "in"))
    assert (written + there, there, left_out) == (10, len(done), [])
    assert all((tmp_path / "in" / each).stat().st_mtime_ns == time for each, time in done.items())
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == members


def test_names_of_chinese_windows_and_what_is_no_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("xx.txt", b"1")
    data = (tmp_path / "d.zip").read_bytes().replace(b"xx.txt", "图".encode("gbk") + b".txt")
    (tmp_path / "d.zip").write_bytes(data)
    assert unpack.unpack(str(tmp_path / "d.zip"), str(tmp_path / "in"))[0] == 1 and (tmp_path / "in/图.txt").exists()
    for signature, place in ((b"PK\3\4", 8), (b"PK\1\2", 10)):  # Deflate64, as Windows packs large files
        start = data.index(signature) + place
        data = data[:start] + b"\x09\0" + data[start + 2 :]
    (tmp_path / "d.zip").write_bytes(data)
    assert "Deflate64" in unpack.unpack(str(tmp_path / "d.zip"), str(tmp_path / "other"))[2][0]
    (tmp_path / "page.tar").write_bytes(b"<html>404</html>" * 100)
    found = run("unzip_data.sh", tmp_path / "page.tar")
    assert found.returncode == 1 and "no .tar" in found.stderr and "Traceback" not in found.stderr
