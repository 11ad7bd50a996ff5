"""A real headless Chromium, where one is installed (Debian: `apt-get install chromium`)."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")


def shown(page: Path, script: str, *, width: int = 1200) -> tuple[str, list[str]]:
    """Open a page with a script behind its end; return the title that the script has set, and the lines on the console."""
    with tempfile.TemporaryDirectory() as folder:
        probed = Path(folder) / "probed.html"
        probed.write_text(page.read_text("utf-8").replace("</body>", f"<script>{script}</script></body>"), "utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--enable-logging=stderr",
                   f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000", "--dump-dom", f"file://{probed}"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    return title[1] if title else "", [line for line in done.stderr.splitlines() if "CONSOLE" in line]
