"""A minimal driver of a headless Chromium, for the tests of the web page: the DevTools protocol
over two pipes, with a zero byte after each JSON message."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# Chromium reads commands from file descriptor 3 and writes to 4.
AS_3_AND_4 = """import fcntl, os, sys
r, w = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(r, 3), os.dup2(w, 4)
os.execv(sys.argv[3], sys.argv[3:])"""
# The lowest contrast of a visible text with what is behind it, which counts as opaque.
LOWEST_CONTRAST = """(() => {
    const numbers = color => color.match(/[\\d.]+/g).map(Number);
    const linear = c => c / 255 <= .04045 ? c / 255 / 12.92 : ((c / 255 + .055) / 1.055) ** 2.4;
    const bright = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b) + .05;
    let lowest = [99, ""];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node = walker.nextNode(); node; node = walker.nextNode()) {
        let e = node.parentElement;
        if (!node.data.trim() || !e.checkVisibility()) continue;
        const text = bright(numbers(getComputedStyle(e).color));
        while (numbers(getComputedStyle(e).backgroundColor)[3] === 0) e = e.parentElement;
        const behind = bright(numbers(getComputedStyle(e).backgroundColor));
        const contrast = Math.max(text, behind) / Math.min(text, behind);
        if (contrast < lowest[0]) lowest = [contrast, node.data];
    }
    return lowest;
})()"""


class Page:
    def __init__(self, to_browser: int, from_browser: int):
        self.out, self.inp = open(to_browser, "wb", 0), open(from_browser, "rb")
        self.n, self.session, self.waiting = 0, None, b""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target,
                                 flatten=True)["sessionId"]
        self.errors: list[str] = []  # uncaught, of the page
        self.call("Page.enable")
        self.call("Runtime.enable")

    def call(self, method: str, **params) -> dict:
        """Sends a command and waits for its result."""
        self.n += 1
        message = dict(id=self.n, method=method, params=params)
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.waiting:
                part = os.read(self.inp.fileno(), 1 << 16)
                if not part:
                    raise RuntimeError("chromium has ended")
                self.waiting += part
            text, _, self.waiting = self.waiting.partition(b"\0")
            reply = json.loads(text)
            if reply.get("method") == "Runtime.exceptionThrown":
                self.errors.append(str(reply["params"]["exceptionDetails"]))
            if reply.get("id") == self.n:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                return reply["result"]

    def run(self, script: str):
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True,
                           returnByValue=True, userGesture=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, script: str, seconds: float = 120):
        """Waits until the expression is true; returns its value."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            if time.monotonic() > end:
                text = self.run("document.body.innerText")
                raise AssertionError(f"{script} does not become true in {seconds} s:\n{text}")
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """A real click, where the element is on the screen. Waits until it stays there: a picture
        that was still being decoded moved the text below it, and the click went elsewhere."""
        x, y = self.until(f"""(async () => {{
            const e = document.querySelector({json.dumps(selector)});
            if (!e || ![...document.images].every(image => image.complete)) return null;
            e.scrollIntoView({{block: "nearest"}});
            const place = () => {{
                const r = e.getClientRects()[0];
                return r ? [r.x + r.width / 2, r.y + r.height / 2] : [-1, -1];
            }};
            const before = place();
            await new Promise(done => setTimeout(done, 50));
            const [x, y] = place();
            const hit = document.elementFromPoint(x, y);
            return x === before[0] && y === before[1] && e.contains(hit) ? [x, y] : null;
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Into the field that has the focus; "\\n" is the Enter key."""
        for line in text.splitlines(keepends=True):
            self.call("Input.insertText", text=line.rstrip("\n"))
            if line.endswith("\n"):
                for kind in ("keyDown", "keyUp"):
                    self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
                              text="\r", windowsVirtualKeyCode=13)

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia",
                  features=[dict(name="prefers-color-scheme", value=scheme)])

    def choose_file(self, selector: str, path: Path) -> None:
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def screenshot(self, path: Path) -> None:
        content = self.call("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(content))


@contextlib.contextmanager
def open_page(url: str, profile: Path) -> Iterator[Page]:
    commands, replies = os.pipe(), os.pipe()
    chromium = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}"]
    process = subprocess.Popen(
        [sys.executable, "-c", AS_3_AND_4, str(commands[0]), str(replies[1]), *chromium],
        pass_fds=(commands[0], replies[1]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(commands[0])
    os.close(replies[1])
    try:
        page = Page(commands[1], replies[0])
        page.call("Page.navigate", url=url)
        yield page
    finally:
        process.terminate()
        process.wait(30)
