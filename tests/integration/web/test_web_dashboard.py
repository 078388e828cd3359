"""The dashboard's files: how they are served, and what they may not contain."""

from __future__ import annotations

import re
from urllib.parse import urljoin

import pytest

from koan_ray.web.dashboard import STATIC

FILES = sorted(path for path in STATIC.iterdir() if path.is_file())
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
MARKUP = r"innerHTML|outerHTML\s*=|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function"


def text_of(path):
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_file_is_served_to_everybody_and_asked_for_again(api, path):
    answer = api.get(f"/{path.name}", None)
    assert answer.status_code == 200
    assert answer.headers["content-type"].partition(";")[0] == TYPES[path.suffix]
    assert answer.headers["cache-control"] == "no-cache"
    assert "script-src 'self'; style-src 'self'" in answer.headers["content-security-policy"]
    again = api.get(f"/{path.name}", None, headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304


def test_the_page_is_at_the_root_and_nowhere_else(api):
    assert b'<script type="module" src="app.js">' in api.get("/", None).content
    for path in ("/jobs", "/jobs/0198f0c2-7b7e-7cc2-a1f5-2f1d1e6a9b10", "/nowhere/at/all"):
        answer = api.get(path, None, follow_redirects=False)
        assert answer.status_code == 307
        assert urljoin(f"https://a.proxy/prefix{path}", answer.headers["location"]) == "https://a.proxy/prefix/"
    assert api.get("/missing.js", None).status_code == 404


@pytest.mark.parametrize("path", ["/jobs", "/nowhere/at/all", "/api/nowhere", "/api/jobs/ABC", "/api/jobs/cancel/it"])
def test_a_program_that_takes_no_page_is_answered_with_a_problem(api, path):
    answer = api.get(path, None, headers={"Accept": "application/json"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_the_page_holds_no_script_no_style_and_nothing_from_elsewhere():
    page = text_of(STATIC / "index.html")
    assert re.findall(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\sstyle=|\son\w+=|https?:", page) == []
    for path in FILES:
        addresses = [found for found in re.findall(r"https?://[^\s\"'`)]+", text_of(path)) if "www.w3.org" not in found]
        assert addresses == [], path.name
        assert "@import" not in text_of(path)


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix == ".js"], ids=lambda path: path.name)
def test_a_module_makes_no_markup_of_texts_and_imports_what_there_is(path):
    text = text_of(path)
    assert re.findall(MARKUP, text) == []
    for name in re.findall(r"""from "\./([^"]+)";""", text):
        assert (STATIC / name).is_file(), name
    for names, source in re.findall(r"""import \{ ([^}]+) \} from "\./([^"]+)";""", text):
        exported = set(re.findall(r"export (?:async )?(?:function|class|const|let) (\w+)", text_of(STATIC / source)))
        assert {name.split(" as ")[0].strip() for name in names.split(",")} <= exported
        body = text.partition(f'from "./{source}";')[2]
        for name in names.split(","):
            assert re.search(rf"\b{name.split(' as ')[-1].strip()}\b", body), f"{name} is imported and not used"


def test_all_of_it_is_small():
    assert sum(path.stat().st_size for path in FILES) < 250_000
