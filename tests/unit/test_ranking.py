"""Descriptions in free text rank services by what the catalogue says of them, and never fail."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controlplane.catalogue import Catalogue
from controlplane.ranking import Ranking

SAID = {
    "chat": "everyday conversation, small talk and plain answers",
    "code": "writes, explains and repairs computer programs in Python, C and Rust",
    "medic": "answers medical questions about symptoms, drugs and diagnoses for clinicians",
    "legal": "drafts contracts and explains law and regulation",
    "travel": "tourist guide: sights, museums, restaurants and directions in a city",
}


def catalogue() -> Catalogue:
    return Catalogue.model_validate(
        {
            "qos_profiles": [{"name": "QOS_E"}],
            "services": [
                {
                    **{"aisi": aisi, "task": "text-generation", "model": "m"},
                    **{"description": said, "address4": f"198.18.0.{n}"},
                    "address6": f"fd00:a151::{n}",
                }
                for n, (aisi, said) in enumerate(SAID.items(), start=1)
            ],
        }
    )


CATALOGUE = catalogue()
RANKING = Ranking(CATALOGUE)


@pytest.mark.parametrize(
    ("description", "best"),
    [
        ("help me repair a bug in my Python program", "code"),
        ("which drugs interact with these symptoms?", "medic"),
        ("draft a contract for a rental", "legal"),
        ("show me museums and restaurants near here", "travel"),
        ("just some conversation", "chat"),
        ("a guide to the sights of the city", "travel"),
        ("explain this regulation", "legal"),
    ],
)
def test_the_service_that_says_so_is_the_most_relevant(description: str, best: str) -> None:
    relevance = dict(zip(SAID, RANKING(CATALOGUE, description, CATALOGUE.services), strict=True))
    assert max(relevance, key=lambda aisi: relevance[aisi]) == best
    assert relevance[best] == 1.0


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=1000))
def test_no_text_fails(description: str) -> None:
    relevance = RANKING(CATALOGUE, description, CATALOGUE.services)
    assert len(relevance) == len(SAID)
    assert all(0 <= value <= 1 for value in relevance)


def test_a_text_with_nothing_in_common_prefers_nobody() -> None:
    assert set(RANKING(CATALOGUE, "xyzzy", CATALOGUE.services)) == {0.0}
    assert set(RANKING(CATALOGUE, "", CATALOGUE.services)) == {0.0}
