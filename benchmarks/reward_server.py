"""A grader that asks a server by HTTP, and the server: `python -m benchmarks.reward_server PORT`.

`config.data.grader=benchmarks.reward_server:ask`, with the port in the environment's REWARD_PORT.
"""

import http.server
import os
import sys
import urllib.parse
import urllib.request

from benchmarks.run_processes import has_digit

PORT = "REWARD_PORT"
PATIENCE_S = 5.0
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs none


def ask(response: str, answer: str) -> float:
  """The server's reward of a response.

  Raises:
    OSError: if it does not answer.
  """
  query = urllib.parse.urlencode({"response": response, "answer": answer})
  url = f"http://localhost:{os.environ[PORT]}/?{query}"
  with _OPENER.open(url, timeout=PATIENCE_S) as reply:
    return float(reply.read())


class _Grading(http.server.BaseHTTPRequestHandler):
  def do_GET(self) -> None:  # the name that the library calls
    query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query, keep_blank_values=True)
    reward = str(has_digit(query["response"][0], query["answer"][0])).encode()
    self.send_response(200)
    self.send_header("Content-Length", str(len(reward)))
    self.end_headers()
    self.wfile.write(reward)

  def log_message(self, *_) -> None:
    """Says nothing: a run asks thousands of times."""


def serve(port: int) -> None:
  """Grades until the process is killed."""
  with http.server.ThreadingHTTPServer(("localhost", port), _Grading) as server:
    server.serve_forever()


if __name__ == "__main__":
  serve(int(sys.argv[1]))
