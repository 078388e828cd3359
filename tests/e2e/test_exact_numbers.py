"""Numbers that JavaScript cannot hold are shown by the page as they are, and sent back as they were typed."""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from typing import Any

import pytest
from pydantic import BaseModel

import koan_ray as koan
from tests.e2e.site import CHROMIUM, TOKENS, browser, site

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
BIG = 2**53 + 1  # 9007199254740993, which a double reads as …992
HUGE = 10**40 + 7
WITHIN_MS = 10_000
seen: queue.Queue[Any] = queue.Queue()
gate = threading.Event()


class Numbers(BaseModel):
    whole: int
    share: float = 0.5
    many: list[int] = []
    named: dict[str, int] = {}
    anything: Any = None


class Sums(koan.Job[Numbers, dict]):
    """Gives back what it got."""

    def execute(self, context, progress, cancellation) -> dict:
        seen.put(context)
        progress.report(0.5, "here")
        gate.wait(20)
        text = f'“{context.whole}” \\ " 1.0'
        whole, anything = context.whole, context.anything
        return {"whole": whole, "twice": 2 * whole, "text": text, "one": 1.0, "anything": anything}


class Refusing(koan.FiniteJob[int, int, int]):
    retry = koan.RetryPolicy(max_attempts=1)
    items = koan.ItemOptions(retry=koan.RetryPolicy(max_attempts=1))

    def get_items(self, context):
        return [context, {"id": context}]

    def process_item(self, item, index, progress):
        raise ValueError(f"not {item}")

    def build_result(self, summary) -> int:
        return summary.failed_items


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    with site(tmp_path_factory.mktemp("site")) as (_, url):
        yield url


@pytest.fixture(scope="module")
def chrome(here):
    with browser() as found:
        yield found


@pytest.fixture
def visit(chrome, here):
    contexts, wrong = [], []

    def open_page(path):
        context = chrome.new_context(locale="en-GB", viewport={"width": 1280, "height": 900})
        context.set_default_timeout(WITHIN_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(f"{error.message}\n{error.stack}"))
        page.goto(f"{here}/#token={TOKENS['admin']}")
        page.wait_for_selector("nav[aria-label=Pages]")
        page.goto(f"{here}/{path}")
        return page

    gate.clear()
    yield open_page
    gate.set()
    for context in contexts:
        context.close()
    assert wrong == []


def code(page, text):
    page.locator(".code", has_text=text).first.wait_for()


def test_contexts_results_and_metadata_are_shown_exactly_and_stay_so_when_the_job_changes(visit):
    given = Numbers(whole=BIG, share=1e22, many=[HUGE, -BIG], named={"a": BIG}, anything=[1.0, -0.0, 1e-7, BIG, "1.0", 5])
    job = Sums.start(given).with_metadata(tenant=BIG, share=2.0, plain=7).run().get(timeout=10)
    page = visit(f"#/jobs/{job.id}")
    code(page, f'"whole": {BIG}')
    for text in ('"share": 1e+22', str(HUGE), str(-BIG), "1.0,", "-0.0", '"1.0"'):
        code(page, text)
    code(page, f'"tenant": {BIG}')
    code(page, '"share": 2.0')
    gate.set()
    page.locator(".page-head .badge", has_text="completed").wait_for()  # told by the stream, with the job's metadata
    code(page, f'"twice": {2 * BIG}')
    code(page, '"one": 1.0')
    code(page, f'"tenant": {BIG}')
    code(page, '"plain": 7')


def test_the_page_itself_copies_what_it_shows(visit):
    job = Sums.start(Numbers(whole=HUGE)).run().get(timeout=10)
    page = visit(f"#/jobs/{job.id}")
    code(page, str(HUGE))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy the context").click()
    page.wait_for_function("navigator.clipboard.readText().then((text) => text.includes('whole'))")
    assert json.loads(page.evaluate("navigator.clipboard.readText()"))["whole"] == HUGE


def test_a_form_sends_the_digits_that_were_typed(visit):
    while not seen.empty():
        seen.get()
    page = visit("#/kinds/Sums/start")
    page.get_by_label("Whole").fill(str(BIG))
    page.get_by_label("Share").fill("0.1")
    page.locator("fieldset", has_text="Many").get_by_role("button", name="Add").first.click()
    page.get_by_role("textbox", name="Many 1").fill(f"-{HUGE}")
    page.get_by_label("Anything").fill(f'{{"deep": [{HUGE}, 1.0, "1.0", {BIG}]}}')
    page.get_by_label("Metadata").fill(f"tenant={BIG}, share=1.50, text=x")
    gate.set()
    page.get_by_role("button", name="Start the job").click()
    context = seen.get(timeout=10)
    assert (context.whole, context.share, context.many) == (BIG, 0.1, [-HUGE])
    assert context.anything == {"deep": [HUGE, 1.0, "1.0", BIG]}
    assert [type(each) for each in context.anything["deep"]] == [int, float, str, int]
    page.locator(".page-head .badge", has_text="completed").wait_for()
    job = koan.Jobs.get(page.url.rpartition("/")[2]).get(timeout=10)
    assert job.metadata == {"tenant": BIG, "share": 1.5, "text": "x"}


def test_json_and_form_hand_numbers_to_each_other_unchanged(visit):
    while not seen.empty():
        seen.get()
    page = visit("#/kinds/Sums/start")
    page.get_by_label("Whole").fill(str(HUGE))
    page.get_by_role("button", name="Edit as JSON").click()
    written = page.get_by_label("Context as JSON")
    assert json.loads(written.input_value())["whole"] == HUGE
    written.fill(written.input_value().replace(str(HUGE), str(HUGE + 1)))
    page.get_by_role("button", name="Edit as a form").click()
    assert page.get_by_label("Whole").input_value() == str(HUGE + 1)
    page.get_by_role("button", name="Edit as JSON").click()
    gate.set()
    page.get_by_role("button", name="Start the job").click()
    assert seen.get(timeout=10).whole == HUGE + 1


def test_what_is_no_number_is_refused_as_before(visit):
    page = visit("#/kinds/Sums/start")
    for text, wrong in (
        ("5.5", "expected a whole number"),
        ("five", "expected a number"),
        ("1e400", "expected a whole number"),
    ):
        page.get_by_label("Whole").fill(text)
        page.get_by_role("button", name="Start the job").click()
        page.locator(".wrong", has_text=wrong).wait_for()
    page.get_by_label("Whole").fill("007")
    page.get_by_label("Share").fill("1e400")
    page.get_by_role("button", name="Start the job").click()
    page.locator(".wrong, .notice", has_text="too large").first.wait_for()  # the server says it; the page sent it as typed
    page.get_by_role("button", name="Edit as JSON").click()
    page.get_by_label("Context as JSON").fill('{"whole": 01}')
    page.get_by_role("button", name="Start the job").click()
    page.locator(".notice", has_text="is not JSON").wait_for()


def test_lists_are_filtered_by_such_metadata(visit):
    gate.set()
    one = Sums.start(Numbers(whole=1)).named("the one").with_metadata(number=BIG).run().get(timeout=10)
    two = Sums.start(Numbers(whole=2)).named("its neighbour").with_metadata(number=BIG - 1).run().get(timeout=10)
    for job in (one, two):
        job.wait().get(timeout=10)
    page = visit(f"#/jobs?metadata.number={BIG}")
    page.locator("table.jobs tbody tr", has_text="the one").wait_for()
    assert page.locator("table.jobs tbody tr").count() == 1
    gate.clear()
    for name, number in (("another neighbour", BIG - 1), ("another one", BIG)):  # told by the stream, judged by the page
        Sums.start(Numbers(whole=3)).named(name).with_metadata(number=number).run().get(timeout=10)
    page.locator("table.jobs tbody tr", has_text="another one").wait_for()
    assert page.locator("table.jobs tbody tr", has_text="neighbour").count() == 0


def test_dead_items_are_shown_exactly(visit):
    job = Refusing.start(BIG).run().get(timeout=10)
    with contextlib.suppress(koan.JobFailedError):
        job.wait().get(timeout=10)
    page = visit(f"#/jobs/{job.id}")
    page.get_by_role("button", name="Show dead items").click()
    code(page, f'"id": {BIG}')
