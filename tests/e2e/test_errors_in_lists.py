"""A list of jobs says what went wrong in words, also of what fails while one looks at it."""

from __future__ import annotations

import contextlib
import threading

import pytest

import koan_ray as koan
from tests.e2e.site import CHROMIUM, TOKENS, browser, site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
gate = threading.Event()


class Fails(koan.Job[str, None]):
    retry = koan.RetryPolicy(max_attempts=1)

    def execute(self, context, progress, cancellation) -> None:
        gate.wait(20)
        raise LookupError(f"{context}\nand more")


def test_a_row_says_type_and_first_line_and_to_a_viewer_the_type_alone(tmp_path):
    with site(tmp_path) as (_, url):
        early = Fails.start("nobody is called Ada").named("early").run().get(timeout=10)
        late = Fails.start("nobody is called Grace").named("late").run().get(timeout=10)
        with browser() as chrome:
            pages = {}
            for role in ("admin", "viewer"):
                pages[role] = chrome.new_context().new_page()
                pages[role].set_default_timeout(10_000)
                pages[role].goto(f"{url}/#token={TOKENS[role]}")
                pages[role].wait_for_selector("nav[aria-label=Pages]")
                pages[role].goto(f"{url}/#/jobs")
                pages[role].locator("table.jobs tbody tr", has_text="late").wait_for()
            gate.set()
            for job in (early, late):
                with contextlib.suppress(koan.JobFailedError):
                    job.wait().get(timeout=10)
            for name, person in (("early", "Ada"), ("late", "Grace")):
                row = pages["admin"].locator("table.jobs tbody tr", has_text=name)
                row.filter(has_text=f"LookupError: nobody is called {person}").wait_for()
                assert "and more" not in row.inner_text()
                row = pages["viewer"].locator("table.jobs tbody tr", has_text=name)
                row.filter(has_text="LookupError").wait_for()
                assert "nobody" not in row.inner_text()
