"""GSM8K from a server: what TFDS downloads, and how soon it is told that there is no network."""

import functools
import http.server
import pathlib
import shutil
import socket
import threading
import time

import pytest
import requests
from tensorflow_datasets.text.gsm8k import gsm8k

from spo_jax.data import download, source
from spo_jax.data.download import check_reachable
from spo_jax.errors import UserError

SAMPLES = pathlib.Path(__file__).parent / "samples"
SPLITS = ("train", "test", "train_socratic", "test_socratic")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """Address of a server of GSM8K's files."""
  folder = tmp_path_factory.mktemp("served")
  for split in SPLITS:
    shutil.copy(SAMPLES / "gsm8k" / f"{split.split('_')[0]}.jsonl", folder / f"{split}.jsonl")
  handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


@pytest.fixture
def closed():
  """An address at which nobody listens."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    yield f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
  """No proxy, and no pauses."""
  for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(download, "PAUSES_S", (0.0, 0.0))


def serve_from(monkeypatch, address):
  monkeypatch.setattr(gsm8k, "_URLS", {split: f"{address}/{split}.jsonl" for split in SPLITS})


def test_gsm8k_as_tfds_downloads_it(tmp_path, monkeypatch, server):
  serve_from(monkeypatch, server)
  load = lambda split, manual_dir: list(
    source.load_split("gsm8k", "plain", split, str(tmp_path), manual_dir=manual_dir)
  )
  for split in ("train", "validation", "test"):
    assert load(split, "") == load(split, str(SAMPLES))


def test_without_a_network_the_way_out_is_told_soon(tmp_path, monkeypatch, closed):
  serve_from(monkeypatch, closed)
  began = time.monotonic()
  message = r"\(no connection to 127.0.0.1: ConnectionError\): set config.data.manual_dir .*gsm8k/"
  with pytest.raises(UserError, match=message) as error:
    source.load_split("gsm8k", "plain", "test", str(tmp_path))
  assert "\n" not in str(error.value)
  assert time.monotonic() - began < 20


def test_any_answer_will_do(server):
  check_reachable(f"{server}/train.jsonl")
  check_reachable(f"{server}/no such file")


def test_proxies_of_the_environment_are_asked(monkeypatch, server):
  url = "http://host.invalid/train.jsonl"
  with pytest.raises(ConnectionError, match="no connection to host.invalid"):
    check_reachable(url)
  monkeypatch.setenv("HTTP_PROXY", server)
  check_reachable(url)


def test_a_host_that_says_nothing_is_not_waited_for():
  with socket.create_server(("127.0.0.1", 0)) as mute:
    began = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer from 127.0.0.1 in 0.2 s"):
      check_reachable(f"http://127.0.0.1:{mute.getsockname()[1]}", deadline_s=0.2)
    assert time.monotonic() - began < 5


def test_a_failure_that_passes_is_passed_over(monkeypatch, server):
  get, tries = requests.get, []

  def fail_once(url, **kwargs):
    tries.append(url)
    if tries.count(server) == 1:
      raise requests.ConnectionError("for a moment")
    return get(url, **kwargs)

  monkeypatch.setattr(requests, "get", fail_once)
  check_reachable(server)
  assert tries.count(server) == 2  # A thread of another test may still ask elsewhere.


def test_what_is_wrong_with_an_answer_is_left_to_tfds(monkeypatch):
  def redirects(*args, **kwargs):
    raise requests.TooManyRedirects("30 of them")

  monkeypatch.setattr(requests, "get", redirects)
  check_reachable("http://host.invalid", deadline_s=5)
