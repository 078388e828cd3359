"""A secret is stored as what it is, and shown by nothing: with its class, under an alias, and without its class."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from pydantic import BaseModel, Field, SecretBytes, SecretStr

import koan_ray as koan
from koan_ray import registry
from koan_ray.plain import job_object, view_of
from koan_ray.web import presenting
from koan_ray.web.redaction import REDACTED, Redactor

CANARY = "canary-1f2e"


class Opening(BaseModel):
    pin: SecretStr
    codes: list[SecretBytes] = Field(default=[], alias="theCodes")
    note: str = Field(default="", alias="aNote", json_schema_extra={"writeOnly": True})


class OpenVault(koan.Job[Opening, SecretStr]):
    kind = "hidden.OpenVault"

    def execute(self, context, progress, cancellation) -> SecretStr:
        return SecretStr(context.pin.get_secret_value())


@pytest.fixture
def opened(local_engine):
    given = Opening(pin=CANARY, theCodes=[CANARY.encode()], aNote=CANARY)
    job = OpenVault.start(given).run().get(10)
    assert job.wait(10).get().get_secret_value() == CANARY
    assert job.context == given
    return job


def record(job):
    view = view_of(job)
    return SimpleNamespace(terms=SimpleNamespace(kind=view.kind), context=view.context, result=view.result)


@pytest.mark.parametrize("is_known", [True, False])
def test_the_api_shows_no_secret_whether_it_knows_the_class_or_not(opened, is_known):
    stored = record(opened)
    if not is_known:
        registry._by_kind.clear()
        context = json.loads(stored.context)
        stored.context = json.dumps({**context, "note": ""}).encode()  # writeOnly is something that only a schema says
    redactor = Redactor()
    assert presenting.payload(stored, "context", redactor)["pin"] == REDACTED
    assert presenting.payload(stored, "result", redactor) == REDACTED
    assert CANARY not in str(presenting.payload(stored, "context", redactor))
    assert redactor.text(f"wrong: {CANARY}") == f"wrong: {REDACTED}"


def test_commands_show_stars(opened):
    assert CANARY not in str(job_object(opened, whole=True)["result"])
    assert job_object(opened, whole=True)["context"]["pin"] == "**********"


def test_a_job_whose_class_is_not_known_has_its_secrets_as_secrets(opened):
    found = koan.Job._in_hand(view_of(opened))
    assert found.context["pin"] == SecretStr(CANARY)
    assert CANARY not in repr(found.context["pin"])


def test_an_error_about_a_secret_does_not_say_it():
    class Forgetful(SecretStr):
        pass

    class Holds(BaseModel):
        it: SecretStr

    class Keeps(koan.Job[Holds, None]):
        def execute(self, context, progress, cancellation) -> None: ...

    with pytest.raises(koan.InvalidContextError) as refused:
        Keeps.start(Holds.model_construct(it=Forgetful(CANARY)))
    assert "it" in str(refused.value)
    assert CANARY not in str(refused.value)


def test_what_a_schema_or_a_name_says_is_a_secret_is_hidden_within_tags():
    class A(BaseModel):
        note: str = Field(json_schema_extra={"writeOnly": True})

    class B(A): ...

    class Unites(koan.Job[A | B, None]):
        kind = "hidden.Unites"

        def execute(self, context, progress, cancellation) -> None: ...

    encoded = Unites.definition.encode_context(B(note=CANARY))
    assert b"koan:choice" in encoded
    stored = SimpleNamespace(terms=SimpleNamespace(kind="hidden.Unites"), context=encoded, result=None)
    assert CANARY not in str(presenting.payload(stored, "context", Redactor()))
    assert Redactor().value({"koan:dict": [["password", CANARY], [1, "x"]]}) == {
        "koan:dict": [["password", REDACTED], [1, "x"]]
    }
