"""A judge as a server process of its own: `python judge_server.py` prints its port, then answers.

What it does with a request is written in the request's text: "score=7" answers that, "fail=503x2" answers 503
twice before, "sleep=5" keeps it waiting, "say=..." answers something else; "/log" has what was asked.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

log: list[dict] = []
seen: Counter[str] = Counter()


class Judge(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._reply(200, log)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"][-1]["text"]
        log.append({"path": self.path, "key": self.headers.get("Authorization"), "body": body})
        seen[text] += 1
        if failing := re.search(r"fail=(\d+)x(\d+)", text):
            code, times = map(int, failing.groups())
            if seen[text] <= times:
                self._reply(code, {"error": "told\nto fail"})
                return
        if sleeping := re.search(r"sleep=([\d.]+)", text):
            time.sleep(float(sleeping.group(1)))
        if "hang up" in text:
            self.close_connection = True
            return
        said = re.search(r"say=(.*)", text)
        score = re.search(r"score=([\d.]+)", text)
        answer = said.group(1) if said else f"Well. SCORE: {score.group(1)}"
        self._reply(200, {} if answer == "nothing" else {"choices": [{"message": {"content": answer}}]})

    def _reply(self, code: int, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        return None


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    print(server.server_port, flush=True)
    sys.stdin.close()
    server.serve_forever()
