"""A client of the server: starts one, streams a reply, and shows each token's stage.

It needs the extra `server`. Any client of OpenAI's API works; this one is the standard library's.

    python examples/client.py "What is the capital of Japan?"
"""

import json
import re
import subprocess
import sys
from urllib.request import Request, urlopen


def main(question: str = "What is the capital of Japan?") -> None:
    command = [sys.executable, "-m", "mlx_poe", "server", "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        url = api_of(server)
        print(f"asking {url}")
        body = {
            "model": "poe-tiny-chat",
            "messages": [{"role": "user", "content": question}],
            "mode": "speculative",
            "stream": True,
            "token_stages": True,
        }
        headers = {"Content-Type": "application/json"}
        request = Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
        with urlopen(request) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    for token in choice.get("token_stages", []):
                        how = "drafted" if token["from_draft"] else ""
                        print(f"stage {token['stage']} {how:8} {bytes(token['bytes']).decode()!r}")
    finally:
        server.terminate()
        server.communicate()


def api_of(server: subprocess.Popen[str]) -> str:
    """The address that a server prints once it is ready."""
    for line in server.stderr or ():
        if found := re.match(r"API +(\S+)", line):
            return found[1]
    raise SystemExit("the server did not start; does it need: pip install -e '.[server]'?")


if __name__ == "__main__":
    main(*sys.argv[1:])
