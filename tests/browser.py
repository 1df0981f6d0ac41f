"""Headless Chromium for tests of a page, by chromedriver's own HTTP: no package is needed.

python tests/browser.py PAGE.html PICTURE.png [--width 1280] [--part "#group"] [--dark]
"""

import argparse
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

DRIVER, CHROMIUM = shutil.which("chromedriver"), shutil.which("chromium")
OPTIONS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-dev-shm-usage"
OPTIONS += " --disable-background-networking --hide-scrollbars"


class Browser:
    """with Browser() as browser: browser.open(page), browser.run("return 1 + 1"), ..."""

    def __enter__(self):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.profile = tempfile.mkdtemp()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.driver = subprocess.Popen([DRIVER, f"--port={self.port}"], **quiet)
        arguments = [*OPTIONS.split(), f"--user-data-dir={self.profile}"]
        chrome = {"binary": CHROMIUM, "args": arguments}
        wanted = {"goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        body = {"capabilities": {"alwaysMatch": wanted}}
        self.session = ""
        try:
            self.wait_for_driver()
            self.session = "/" + self.ask("POST", "/session", body, root=True)["sessionId"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.session:
            self.ask("DELETE", "", None)
        self.driver.terminate()
        self.driver.wait()
        shutil.rmtree(self.profile, ignore_errors=True)

    def wait_for_driver(self):
        for _ in range(300):
            try:
                return self.ask("GET", "/status", None, root=True)
            except OSError:
                time.sleep(0.1)
        raise TimeoutError("chromedriver does not answer")

    def ask(self, method: str, path: str, body, root=False):
        prefix = "" if root else f"/session{self.session}"
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self.port}{prefix}{path}"
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, data, kind, method=method)
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with no_proxy.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:1000]) from error

    def devtools(self, command: str, **parameters):
        body = {"cmd": command, "params": parameters}
        return self.ask("POST", "/goog/cdp/execute", body)

    def look(self, width=1280, height=900, dark=False):
        """The size of the window and the colours that the reader prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path, fragment=""):
        self.ask("POST", "/url", {"url": "about:blank"})  # else a new hash loads nothing
        self.ask("POST", "/url", {"url": Path(page).resolve().as_uri() + fragment})

    def run(self, script: str):
        return self.ask("POST", "/execute/sync", {"script": script, "args": []})

    def click(self, selector: str):
        """A real one, by the mouse."""
        query = {"using": "css selector", "value": selector}
        (element,) = self.ask("POST", "/element", query).values()
        self.ask("POST", f"/element/{element}/click", {})

    def keys(self, text: str):
        """To whatever has the focus."""
        presses = []
        for key in text:
            presses += [{"type": kind, "value": key} for kind in ("keyDown", "keyUp")]
        actions = [{"type": "key", "id": "keyboard", "actions": presses}]
        self.ask("POST", "/actions", {"actions": actions})

    def complaints(self) -> list[str]:
        """What the console has shown since the last call."""
        return [row["message"] for row in self.ask("POST", "/se/log", {"type": "browser"})]

    def picture(self, path: Path, part="body"):
        """From the first to the last of the elements that a selector finds."""
        found = f"[...document.querySelectorAll('{part}')].map(e => "
        found += "e.getBoundingClientRect()).map(box => [box.top, box.bottom])"
        rows, width = self.run(f"return {found}"), self.run("return innerWidth")
        top, height = rows[0][0] - 16, rows[-1][1] - rows[0][0] + 32
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        more = {"captureBeyondViewport": True, "clip": clip}
        shot = self.devtools("Page.captureScreenshot", **more)
        Path(path).write_bytes(base64.b64decode(shot["data"]))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--part", default="body")
    parser.add_argument("--dark", action="store_true")
    options = parser.parse_args()
    if not (DRIVER and CHROMIUM):
        sys.exit("chromium and chromedriver are missing: apt-get install chromium-driver")
    with Browser() as browser:
        browser.look(options.width, 900, options.dark)
        browser.open(options.page)
        tall = browser.run("return document.documentElement.scrollHeight")
        browser.look(options.width, tall, options.dark)  # what sticks below is in its place
        browser.picture(options.picture, options.part)


if __name__ == "__main__":
    main()
