"""GSM8K as TFDS's own builder downloads it, with an early word where there is no network.

TFDS repeats a download for more than three minutes before it gives up, which no setting changes.
"""

import queue
import threading
import time
import urllib.parse

import requests
from tensorflow_datasets.text.gsm8k.gsm8k import Gsm8k

DEADLINE_S = 20.0  # until a host must have answered, whatever was tried meanwhile
CONNECT_S = 4.0  # for each of a host's addresses: the first may be of an IPv6 that leads nowhere
PAUSES_S = (0.0, 1.0, 2.0, 4.0)  # before each try


class Gsm8kDownload(Gsm8k):
  """TFDS's own builder, which reads no manual folder."""

  # It has no checksums, and TFDS needs the package importlib_resources to look for them.
  url_infos = None

  def _split_generators(self, dl_manager):
    return super()._split_generators(_AskFirst(dl_manager))


class _AskFirst:
  """A download manager that asks whether the host can be reached, before TFDS insists on it."""

  def __init__(self, manager):
    self._manager = manager

  def download_and_extract(self, urls: dict[str, str]):
    check_reachable(next(iter(urls.values())))
    return self._manager.download_and_extract(urls)


def check_reachable(url: str, *, deadline_s: float = DEADLINE_S) -> None:
  """Checks that the host of a URL answers; what it answers is not looked at.

  The URL is asked for as TFDS does it, so the environment's proxies and certificates are used.

  Args:
    url: http or https.
    deadline_s: longest wait, in seconds.

  Raises:
    ConnectionError: if there is no answer, from the host or the proxy that leads to it.
  """
  host = urllib.parse.urlsplit(url).hostname
  answers = queue.SimpleQueue()
  # Looking up a name has no timeout of its own, and a thread that waits must not hold the exit.
  threading.Thread(target=lambda: answers.put(_ask(url, deadline_s)), daemon=True).start()
  try:
    error = answers.get(timeout=deadline_s)
  except queue.Empty:
    raise ConnectionError(f"no answer from {host} in {deadline_s:g} s") from None
  if error is not None:
    raise ConnectionError(f"no connection to {host}: {type(error).__name__}") from error


def _ask(url: str, wait_s: float) -> requests.RequestException | None:
  """Why the last of several tries came to nothing; None if one was answered."""
  error = None
  for pause_s in PAUSES_S:
    time.sleep(pause_s)
    try:
      requests.get(url, stream=True, timeout=(CONNECT_S, wait_s)).close()
    except (requests.ConnectionError, requests.Timeout) as failed:
      error = failed
    except requests.RequestException:  # of an answer: let TFDS tell what is wrong with it
      return None
    else:
      return None
  return error
