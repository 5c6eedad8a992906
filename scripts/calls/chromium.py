"""The npm package in a page of another origin: the service has to have that in CORS_ORIGINS."""

import http.server
import os
import shutil
import threading

from playwright.sync_api import sync_playwright

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)))
PAGE = b"""<!doctype html><script type="importmap">{"imports": {
  "openai": "/node_modules/openai/index.mjs", "openai/version": "/node_modules/openai/version.mjs"
}}</script>"""
with open("page.html", "wb") as page_file:
    page_file.write(PAGE)
http.server.SimpleHTTPRequestHandler.extensions_map[".mjs"] = "text/javascript"
http.server.SimpleHTTPRequestHandler.log_message = lambda *_: None
port = int(os.environ["PAGE_PORT"])
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()

with sync_playwright() as playwright:
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/page.html")
    script = "async ([address, model]) => (await import('/openai.mjs')).call(address, model)"
    told = page.evaluate(script, [os.environ["ADDRESS"], os.environ["MODEL"]])
    print(told, "in Chromium", browser.version)
