"""Sources and results in S3: a server on this machine, behind a proxy that refuses, waits and cuts.

Needs ``moto[server]`` and ``s3fs``; CONTRIBUTING.md says how to run it.
"""

import collections
import http.client
import http.server
import threading
import time

import pytest

import loftq
from harness import one_skeleton, run, tiny_source, tree
from loftq.errors import InputError, StorageError, UsageError
from loftq.formats import remote

s3fs = pytest.importorskip("s3fs", reason="needs s3fs and moto[server]: see CONTRIBUTING.md")
server = pytest.importorskip("moto.server", reason="needs s3fs and moto[server]: see CONTRIBUTING.md")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TWO = {"max_shard_bytes": 30_000}  # shards


class Proxy(http.server.BaseHTTPRequestHandler):
    """Passes requests on, but for what ``fault`` says: refuse, cut (the request), lose (the answer), half, slow."""

    protocol_version = "HTTP/1.1"
    behind = 0
    fault = staticmethod(lambda request: "")

    def pass_on(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        what = type(self).fault(f"{self.command} {self.path}")
        if what == "cut":
            return self.hang_up()
        if what == "refuse":
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if what == "slow":
            time.sleep(0.3)
        to = http.client.HTTPConnection("127.0.0.1", self.behind)
        to.request(self.command, self.path, body, dict(self.headers.items()))
        answer = to.getresponse()
        found = answer.read()
        to.close()
        if what == "lose":
            return self.hang_up()
        self.send_response_only(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection"):
                self.send_header(name, value)
        if answer.getheader("Content-Length") is None:
            self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(found[: len(found) // 2] if what == "half" else found)
        if what == "half":
            return self.hang_up()
        return None

    def __getattr__(self, name):
        """The method of every kind of request, such as ``do_GET``."""
        if name.startswith("do_"):
            return self.pass_on
        raise AttributeError(name)

    def hang_up(self):
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_):
        pass


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A connection that was cut is no error here."""


class Bucket:
    """A source in S3, and the requests that were made."""

    def __init__(self, source, golden, name):
        self.source, self.golden, self.name = source, golden, name
        self.asked = []

    @property
    def url(self):
        return f"s3://{self.name}/made"

    def faults(self, chosen):
        """What to do to each request, from now on: by its text, how often it came, and how many there were."""
        counts = collections.Counter()

        def fault(request):
            counts[request] += 1
            self.asked.append(request)
            return chosen(request, counts[request], sum(counts.values()))

        Proxy.fault = staticmethod(fault)

    def run(self):
        return run(f"s3://{self.name}/model", self.url, **TWO)

    def made(self):
        fs = s3fs.S3FileSystem(use_listings_cache=False)
        return {path.removeprefix(f"{self.name}/made/"): fs.cat_file(path) for path in fs.find(f"{self.name}/made")}

    def check(self):
        self.faults(lambda *_: "")
        made, manifest = self.made(), self.golden["loftq_manifest.json"]
        assert made.keys() == self.golden.keys()
        assert all(
            made[name] == raw for name, raw in self.golden.items() if raw != manifest
        )  # it has the source's ETags
        loftq.verify(self.url)


@pytest.fixture(scope="module")
def ports():
    behind = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    behind.start()
    Proxy.behind = behind.get_host_and_port()[1]
    before = Quiet(("127.0.0.1", 0), Proxy)
    threading.Thread(target=before.serve_forever, daemon=True).start()
    yield before.server_address[1]
    before.shutdown()
    behind.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    place = tmp_path_factory.mktemp("local")
    source = tiny_source(place / "source")
    with one_skeleton():
        run(source, place / "out", **TWO)
        yield source, tree(place / "out")


@pytest.fixture
def bucket(request, ports, local, scratch, monkeypatch):
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports}",
        "AWS_ACCESS_KEY_ID": "key-of-the-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-the-test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_MAX_ATTEMPTS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    remote._opened.cache_clear()
    name = f"bucket-{abs(hash(request.node.name))}"
    fs = s3fs.S3FileSystem()
    fs.mkdir(name)
    fs.put(str(local[0]), f"{name}/model", recursive=True)
    yield Bucket(*local, name)
    Proxy.fault = staticmethod(lambda request: "")


def test_there_and_back(bucket):
    bucket.run()
    bucket.check()
    bucket.asked.clear()
    bucket.run()  # done already
    assert not [request for request in bucket.asked if request.startswith(("PUT", "POST", "DELETE"))]
    assert loftq.inspect(bucket.url)["totals"]["matrices"] == 12
    assert loftq.plan(f"s3://{bucket.name}/model", rank=4).coverage == 1


@pytest.mark.parametrize("what", ["refuse", "cut", "lose", "half", "slow"])
def test_every_request_in_trouble_once(bucket, what):
    """s3fs asks again, so the run does not even notice."""
    bucket.faults(lambda request, times, _: what if times == 1 else "")
    bucket.run()
    bucket.check()


@pytest.mark.timeout(3600)
def test_every_request_ends_a_run(bucket, monkeypatch):
    """Every request of a run fails until nobody asks again, once; each time the same command continues."""
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    had, failed = set(), 0
    while True:
        chosen: list = []

        def fault(request, *_, chosen=chosen):
            if not chosen and request not in had:
                chosen.append(request)
            return "cut" if chosen == [request] else ""

        bucket.faults(fault)
        try:
            bucket.run()
            if not chosen:
                break
        except StorageError:
            failed += 1
        had.update(chosen)
        bucket.faults(lambda *_: "")
        made = bucket.made()
        if "loftq_manifest.json" not in made:
            assert "config.json" not in made or bucket.golden.keys() - made.keys() == {"loftq_manifest.json"}
            with pytest.raises(InputError):
                loftq.inspect(bucket.url)
    bucket.check()
    assert failed > 30


def test_a_server_that_is_down(bucket, monkeypatch):
    bucket.faults(lambda *_: "refuse")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    with pytest.raises(StorageError, match=r"s3://bucket-.*check network and credentials") as caught:
        bucket.run()
    assert "of-the-test" not in str(caught.value)


def test_listings_that_are_late(bucket, monkeypatch):
    """Nothing that was written in a run is in any listing."""
    listed = s3fs.S3FileSystem._ls

    async def late(self, path, detail=False, **options):
        left = [info for info in await listed(self, path, detail=True, **options) if "/made" not in info["name"]]
        return left if detail else [info["name"] for info in left]

    monkeypatch.setattr(s3fs.S3FileSystem, "_ls", late)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    bucket.faults(lambda request, *_: "cut" if "PUT" in request and "config.json" in request else "")
    with pytest.raises(StorageError):
        bucket.run()
    bucket.faults(lambda *_: "")
    bucket.run()
    bucket.run()
    loftq.verify(bucket.url)
    monkeypatch.undo()


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises((InputError, StorageError), match="s3://no-such-bucket"):
        loftq.plan("s3://no-such-bucket/model", rank=4)
    with pytest.raises(UsageError, match="leave user, keys"):
        loftq.plan("s3://key:secret@bucket/model", rank=4)
