"""Chromium with `page.html`, opened from disk."""

import base64
import json
import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

folder, photos = sys.argv[1], json.loads(sys.argv[2])
program = """async (text) => Array.from(await (await classifier).probabilities(
    new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))])))"""
with sync_playwright() as driver:
    browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
    page = browser.new_page()
    page.goto(Path(folder, "page.html").absolute().as_uri())
    rows = [page.evaluate(program, base64.b64encode(Path(path).read_bytes()).decode()) for path in photos]
    browser.close()
print(json.dumps(rows))
